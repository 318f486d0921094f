"""What a store is made of: the teacher as the driver knows it, and what it declares and writes of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.recipe import Recipe
from infra.trees import difference
from offline_teacher.masking import continuation_flags, masked_count
from offline_teacher.sequence_building import file_digests
from offline_teacher.sequences import read_index
from offline_teacher.store.head import HEAD_NAME, head_bytes
from offline_teacher.store.manifest import Declaration
from offline_teacher.store.schema import FORMAT_VERSION, Layout, ShardPlan, SpecialIds
from offline_teacher.teacher import load_model, mlm_head
from offline_teacher.teacher_directory import (
    check_fit,
    find_teacher,
    load_config,
    load_tokenizer,
    tokenizer_digest,
    tokenizer_files,
    weight_digest,
)

ARCHITECTURE = (
    "model_type",
    "hidden_act",
    "layer_norm_eps",
    "num_attention_heads",
    "pad_token_id",
)
"""Of the teacher's configuration, what decides its numbers beside the weights and their shapes."""


@dataclass(frozen=True)
class Source:
    """The teacher as the driver knows it, without its weights."""

    directory: str
    config: Any
    tokenizer: Any
    weight_digest: str
    tokenizer_digest: str
    head: bytes
    """The file a store keeps of its masked-LM head."""

    def files(self) -> dict[str, bytes]:
        """Path below a store -> content, of what it keeps of its tokenizer, configuration and head."""
        files = {f"tokenizer/{name}": data for name, data in tokenizer_files(self.tokenizer).items()}
        config = json.loads(self.config.to_json_string(use_diff=False))
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        files[HEAD_NAME] = self.head
        files["teacher/config.json"] = (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()
        return files


def find_source(recipe: Recipe) -> Source:
    """UserError where the teacher cannot be used for this recipe."""
    directory = find_teacher(recipe.teacher)
    config, tokenizer = load_config(directory), load_tokenizer(directory)
    check_fit(directory, config, tokenizer, recipe.sequences.length)
    if recipe.masking.whole_word:
        continuation_flags(json.loads(tokenizer.backend_tokenizer.to_str()), config.vocab_size)
    digest = weight_digest(directory)
    model = load_model(directory, config)  # whether its weights fit is known before Ray starts
    if recipe.store.top_k > config.vocab_size:
        raise UserError(
            f"store.top_k: {recipe.store.top_k} is more than the {config.vocab_size} tokens of the teacher"
        )
    return Source(
        directory=directory,
        config=config,
        tokenizer=tokenizer,
        weight_digest=digest,
        tokenizer_digest=tokenizer_digest(tokenizer),
        head=head_bytes(mlm_head(model)),
    )


def layout_of(recipe: Recipe, source: Source) -> Layout:
    """The dimensions of the recipe's store."""
    return Layout(
        length=recipe.sequences.length,
        masked=masked_count(recipe.sequences.length, recipe.masking.probability),
        vocab_size=source.config.vocab_size,
        top_k=recipe.store.top_k,
        temperatures=recipe.store.temperatures,
        hidden_size=source.config.hidden_size,
        hidden_states=recipe.store.hidden_states,
        positions=recipe.store.positions,
    )


def declare(recipe: Recipe, source: Source, root: str) -> Declaration:
    """What the store is going to hold; needs its finished sequences."""
    index, tokenizer = read_index(root), source.tokenizer
    assert index is not None
    return Declaration(
        layout=layout_of(recipe, source),
        plan=ShardPlan(index.count, recipe.masking.replicas, recipe.store.samples_per_shard),
        special=SpecialIds(
            pad=tokenizer.pad_token_id,
            mask=tokenizer.mask_token_id,
            cls=tokenizer.cls_token_id,
            sep=tokenizer.sep_token_id,
        ),
        fingerprint=_fingerprint(recipe, source, index.corpus_digest),
    )


def _fingerprint(recipe: Recipe, source: Source, corpus_digest: str) -> dict[str, Any]:
    return {
        "recipe": recipe.outcome("corpus", "sequences", "masking", "teacher", "store"),
        "teacher": source.weight_digest,
        "architecture": {name: getattr(source.config, name, None) for name in ARCHITECTURE},
        "tokenizer": source.tokenizer_digest,
        "corpus": corpus_digest,
        "format": FORMAT_VERSION,
    }


def changes(recipe: Recipe, source: Source, begun: Declaration) -> list[str]:
    """What is another now than where a store was ``begun``, its text apart."""
    return difference(begun.fingerprint, _fingerprint(recipe, source, begun.fingerprint["corpus"]))


def refuse_other(recipe: Recipe, source: Source, root: str, begun: Declaration) -> None:
    """UserError where the store, ``begun`` so, is not of this recipe: what looks at it needs its own."""
    changed = changes(recipe, source, begun)
    if changed:
        raise UserError(
            f"{root} was made differently ({'; '.join(changed)}): give the recipe it was made of (--recipe)"
        )


def validation_recipe(recipe: Recipe) -> Recipe:
    """The same for the held-out text, which is masked once."""
    return replace(recipe, masking=replace(recipe.masking, replicas=1))


def as_made(root: str, recipe: Recipe) -> tuple[Recipe, bool]:
    """The recipe as the pass takes it for this store, and whether the store is of the held-out text."""
    validation = root.rstrip("/").rpartition("/")[2] == "validation_store"
    return (validation_recipe(recipe) if validation else recipe), validation


def made_files(root: str, source: Source) -> dict[str, str]:
    """Path below the store -> digest, of what is beside declaration and shards as its makers know it."""
    made = {name: storage.digest_bytes(data) for name, data in source.files().items()}
    return {**made, **file_digests(root)}
