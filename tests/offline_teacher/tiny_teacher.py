"""Teachers and texts small enough for tests: random weights, a vocabulary of a few words or of bytes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

WORDS = [
    f"{start}{end}" for start in ("ba", "do", "ki", "lu", "me", "no", "ru", "sa") for end in "bdgklmnprst"
]
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def save_bert(
    directory: Path, seed: int = 0, vocab_size: int | None = None, scale: float = 0.3, **changes: Any
) -> Path:
    """A BertForMaskedLM with a WordPiece tokenizer; every parameter, biases too, is random."""
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    config = BertConfig(
        vocab_size=vocab_size or len(vocab), max_position_embeddings=64, **{**SIZE, **changes}
    )
    return _save(directory, BertForMaskedLM, config, tokenizer, seed, scale)


def save_roberta(directory: Path, seed: int = 0) -> Path:
    """A RobertaForMaskedLM with a byte-level BPE tokenizer without merges."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    config = RobertaConfig(vocab_size=len(names), max_position_embeddings=66, pad_token_id=1, **SIZE)
    return _save(directory, RobertaForMaskedLM, config, tokenizer, seed)


def _save(
    directory: Path,
    kind: type,
    config: object,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    scale: float = 0.3,
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_text(path: Path, lines: int, seed: int = 0) -> Path:
    words = random.Random(seed)
    text = [" ".join(words.choices(WORDS, k=words.randint(3, 30))) for _ in range(lines)]
    path.write_text("\n".join(text) + "\n")
    return path


def write_recipe(directory: Path, text: Path, model: Path, **sections: Mapping[str, object]) -> Path:
    """A recipe whose store is ``directory/runs/tiny/store``, of several tasks, shards and blocks."""
    recipe = {
        "name": "tiny",
        "output": str(directory / "runs"),
        "corpus": {"path": [str(text)]},
        "sequences": {"length": 16, "part_bytes": 4096},
        "teacher": {"model": str(model), "batch_size": 4, "workers": 1},
        "store": {"top_k": 5, "task_sequences": 16, "block_bytes": 6000, "shard_bytes": 12000},
        "tracking": {"enabled": False},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}  # type: ignore[dict-item]
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
