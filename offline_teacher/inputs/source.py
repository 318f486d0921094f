"""The inputs of a store: the teacher, the spec that follows from teacher and recipe, and the teacher's files.
This module runs in the driver, and loads the teacher's weights only to write them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from infra.errors import UserError
from infra.files import storage
from infra.settings.recipe import Recipe
from offline_teacher.corpus.partition import Part
from offline_teacher.families.positions import usable_length
from offline_teacher.models.loading import find_teacher, has_head, read_config, weight_digest
from offline_teacher.models.pooling import Pooling, read_pooling
from offline_teacher.sequences.masking import continuation_flags, masked_count
from offline_teacher.sequences.tokenised_parts import Tokenising, text_digest
from offline_teacher.sequences.tokenizer import (
    Encoder,
    encoder_of,
    load_tokenizer,
    tokenizer_digest,
    tokenizer_files,
)
from offline_teacher.store.manifest import Spec
from offline_teacher.store.paths import CONFIG, POOLING, WEIGHTS
from offline_teacher.store.records import encode
from offline_teacher.store.schema import FORMAT_VERSION, Layout, Plan, SpecialIds
from offline_teacher.store.unfinished import foreign_files

MASKING_PROBABILITY = 0.15
"""Default masking probability for a teacher with a masked-LM head."""
IGNORED_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of the configuration that do not affect the model's outputs."""


@dataclass(frozen=True)
class Source:
    """The teacher's files, configuration and digests, without its weights in memory."""

    directory: str
    config: Any
    tokenizer: Any
    weight_digest: str
    head: bool
    """Whether the teacher has a masked-LM head."""
    pooling: Pooling | None

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """The teacher's configuration without ``IGNORED_KEYS``."""
        config = json.loads(self.config.to_json_string(use_diff=False))
        return {key: value for key, value in config.items() if key not in IGNORED_KEYS}

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer as an ``Encoder``, made from those of its files that a store keeps."""
        return encoder_of(tokenizer_files(self.tokenizer), self.directory)

    def small_files(self) -> dict[str, bytes]:
        """Returns the files of tokenizer, configuration and pooling: path in the store -> content."""
        files = {f"tokenizer/{name}": data for name, data in tokenizer_files(self.tokenizer).items()}
        files[CONFIG] = (json.dumps(self.architecture, indent=1, sort_keys=True) + "\n").encode()
        if self.pooling is not None:
            files[POOLING] = encode(dataclasses.asdict(self.pooling))
        return files

    def weights(self, layout: Layout) -> bytes:
        """Returns the content of ``teacher/model.safetensors``: all weights, or those needed for replay."""
        from safetensors.torch import save

        from offline_teacher.models.loading import load_model, pooler_weights, stored_dtype
        from offline_teacher.models.weights import named_weights, top_weights

        model = load_model(self.directory, self.config)
        if layout.teacher_weights:
            tensors = named_weights(model) | pooler_weights(self.directory, self.config)
        else:
            tensors = top_weights(model, layout.replay_layers)
        dtype = stored_dtype(self.directory)
        return save({name: tensor.to(dtype) for name, tensor in tensors.items()}, metadata={"format": "pt"})


def find_source(recipe: Recipe) -> tuple[Source, Recipe]:
    """Returns the teacher, and the recipe with the defaults that depend on the teacher filled in. Raises
    UserError if teacher and recipe do not fit together."""
    assert recipe.teacher is not None
    directory = find_teacher(recipe.teacher)
    config, tokenizer = read_config(directory), load_tokenizer(directory)
    check_fit(directory, config, tokenizer, recipe.sequences.length)
    source = Source(
        directory=directory,
        config=config,
        tokenizer=tokenizer,
        weight_digest=weight_digest(directory),
        head=has_head(directory, config),
        pooling=read_pooling(directory),
    )
    if recipe.masking.probability is None:
        pooled = recipe.store.positions == "pooled"
        probability = MASKING_PROBABILITY if source.head and not pooled else 0.0
        epochs = recipe.masking.epochs if probability else 1
        masking = dataclasses.replace(recipe.masking, probability=probability, epochs=epochs)
        if not probability and recipe.store.positions == "masked":
            raise UserError(
                f"store.positions: masked needs masked tokens, but the teacher {directory} has no masked-LM"
                " head, so none are masked; set store.positions: all"
            )
        recipe = dataclasses.replace(recipe, masking=masking)
    _check_store(recipe, source)
    return source, recipe


def check_fit(directory: str, config: Any, tokenizer: Any, length: int) -> None:
    """UserError unless tokenizer, model and sequence length belong together."""
    name, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= config.vocab_size:  # rows without a token are no reason: many models have some
        raise UserError(
            f"teacher.model: the tokenizer of {directory} has the token {name!r} with id {largest}, its model"
            f" only {config.vocab_size} rows of embeddings: they are not of the same vocabulary"
        )
    if config.pad_token_id is not None and config.pad_token_id != tokenizer.pad_token_id:
        raise UserError(
            f"teacher.model: the tokenizer of {directory} pads with id {tokenizer.pad_token_id}, its model"
            f" expects {config.pad_token_id}: they are not of the same vocabulary"
        )
    positions = usable_length(config)
    if length > positions:
        raise UserError(f"sequences.length: {length} is more than the {positions} positions of {directory}")


def _check_store(recipe: Recipe, source: Source) -> None:
    """Raises UserError if the teacher cannot compute what the store is to hold."""
    from offline_teacher.models.weights import check_depth  # torch

    store, masking, config = recipe.store, recipe.masking, source.config
    check_depth(config, store.replay_layers)
    where = f"the teacher {source.directory}"
    if store.top_k and not source.head:
        raise UserError(f"store.top_k: {where} has no masked-LM head and so no logits; set store.top_k: 0")
    if store.top_k > config.vocab_size:
        raise UserError(f"store.top_k: {store.top_k} is more than the teacher's {config.vocab_size} tokens")
    if masking.probability and source.tokenizer.mask_token_id is None:
        raise UserError(f"masking.probability: {where} has no mask token; set masking.probability: 0")
    if store.positions == "pooled":
        if source.pooling is None:
            what = f"{where} has no modules.json"
            raise UserError(f"store.positions: pooled needs a sentence encoder, but {what}; set it to all")
        if masking.probability:
            raise UserError("masking.probability: pooled vectors come from unmasked text; set it to 0")
        longest = source.pooling.max_length
        if longest is not None and recipe.sequences.length > longest:
            raise UserError(
                f"sequences.length: {recipe.sequences.length} is more than {longest}, the number of tokens to"
                f" which {where} truncates a text; set it to {longest} at most"
            )
    if masking.probability and masking.whole_word:
        continuation_flags(json.loads(source.tokenizer.backend_tokenizer.to_str()), config.vocab_size)


def layout_of(recipe: Recipe, source: Source) -> Layout:
    """Returns the layout (dimensions and columns) of the recipe's store."""
    store, probability = recipe.store, recipe.masking.probability
    assert probability is not None
    pooled = store.positions == "pooled"
    return Layout(
        length=recipe.sequences.length,
        masked=masked_count(recipe.sequences.length, probability) if probability else 0,
        vocab_size=source.config.vocab_size,
        hidden_size=source.config.hidden_size,
        top_k=store.top_k,
        temperatures=store.temperatures if store.top_k else (),
        hidden_states="none" if pooled else store.hidden_states,
        positions=store.positions,
        replay_layers=store.replay_layers,
        teacher_weights=store.teacher_weights,
    )


def tokenising(recipe: Recipe, source: Source) -> Tokenising:
    """Returns the object that turns the text of the recipe into sequences of its store."""
    assert recipe.corpus is not None
    pooled = recipe.store.positions == "pooled"
    counted = bool(recipe.masking.probability) and recipe.masking.sampling == "frequency"
    prompt = source.pooling.prompt if pooled and source.pooling else ""
    layout = layout_of(recipe, source)
    return Tokenising(recipe.store_path, layout, recipe.corpus, recipe.sequences, prompt, counted)


def spec_of(recipe: Recipe, source: Source, parts: dict[str, list[Part]]) -> Spec:
    """Returns the spec of the recipe's store. ``parts``: the text of each split."""
    return spec_with(recipe, source, {split: text_digest(listed) for split, listed in parts.items()})


def spec_with(recipe: Recipe, source: Source, corpus: dict[str, str]) -> Spec:
    """Does what ``spec_of`` does without the text. ``corpus``: ``text_digest`` of each split."""
    layout, store, tokenizer = layout_of(recipe, source), recipe.store, source.tokenizer
    sizes = store.task_sequences, store.block_bytes, store.shard_bytes
    return Spec(
        layout=layout,
        plan=Plan.from_bytes(layout, recipe.masking.epochs, *sizes),
        special=SpecialIds(
            pad=tokenizer.pad_token_id,
            cls=tokenizer.cls_token_id,
            sep=tokenizer.sep_token_id,
            mask=tokenizer.mask_token_id if layout.masked else None,
        ),
        fingerprint={
            "recipe": recipe.fingerprinted_settings("corpus", "sequences", "masking", "teacher", "store"),
            "teacher": source.weight_digest,
            "tokenizer": tokenizer_digest(tokenizer),
            "architecture": source.architecture,
            "corpus": corpus,
            "format": FORMAT_VERSION,
        },
    )


def publish_files(root: str, source: Source, layout: Layout) -> None:
    """Publishes tokenizer, configuration and weights. UserError if their directories have other files."""
    files = source.small_files()
    for name in foreign_files(root, {*files, WEIGHTS}):
        raise UserError(f"{root}: {name} is foreign, not a file of a store; move it out of the store")
    for name, data in files.items():
        storage.publish_if_changed(storage.join(root, *name.split("/")), data)
    storage.publish_if_changed(storage.join(root, *WEIGHTS.split("/")), source.weights(layout))
