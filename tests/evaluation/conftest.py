"""A tiny encoder and a task that it can learn in seconds."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD, BAD, FILLER = (
    ("fine", "warm", "bright"),
    ("dull", "cold", "grey"),
    ("the", "film", "is", "very", "a", "day"),
)
QUICK = ["--max-length", "16", "--tracking", "off", "--latency-sentences", "4"]
"""Options of a command whose report nobody reads."""
WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *GOOD,
    *BAD,
    *FILLER,
    "who",
    "?",
    "red",
    "car",
    "house",
)


def save_encoder(directory: Path, family: str = "bert") -> str:
    """A BERT (with pooler) or DistilBERT (without) of two layers of 32 over ``WORDS``."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DistilBertConfig,
        DistilBertForMaskedLM,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )

    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    torch.manual_seed(0)
    size = len(WORDS)
    model: PreTrainedModel
    if family == "bert":
        model = BertForMaskedLM(
            BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=64, max_position_embeddings=512)
        )  # fmt: skip
    else:
        model = DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=size, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=512
            )
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def save_roberta(directory: Path, positions: int, seed: int = 0) -> str:
    """A RoBERTa, which has one segment type, with ``save_encoder``'s tokenizer, which numbers two."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    save_encoder(directory)  # its tokenizer is kept
    torch.manual_seed(seed)
    RobertaForMaskedLM(
        RobertaConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=64, max_position_embeddings=positions, type_vocab_size=1,
                      pad_token_id=0, bos_token_id=2, eos_token_id=3)
    ).save_pretrained(directory)  # fmt: skip
    return str(directory)


def write_pairs(data: Path, rows: int) -> str:
    """RTE files: whether two sentences are of the same tone."""
    generator = random.Random(0)
    for part in ("train", "dev"):
        lines = []
        for number in range(rows):
            (first, tone), (second, other) = sentiment_row(generator), sentiment_row(generator)
            label = "entailment" if tone == other else "not_entailment"
            lines.append(f"{number}\t{first}\t{second}\t{label}")
        path = data / "RTE" / f"{part}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")
    return str(data)


def sentiment_row(generator: random.Random) -> tuple[str, int]:
    """Filler words and one that decides the label."""
    label = generator.randrange(2)
    words = generator.choices(FILLER, k=generator.randrange(1, 9))
    words.insert(generator.randrange(len(words) + 1), generator.choice((BAD, GOOD)[label]))
    return " ".join(words), label


def write_task(data: Path, rows: int) -> str:
    """SST-2 files."""
    generator = random.Random(0)
    for part, count in (("train", rows), ("dev", 64)):
        path = data / "SST-2" / f"{part}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{text}\t{label}" for text, label in (sentiment_row(generator) for _ in range(count))]
        path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return str(data)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def pooler_free_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("distilbert"), "distilbert")


@pytest.fixture(scope="session")
def headless_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A narrow BERT without a masked-LM head, as a student of relations alone is published."""
    import torch
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("headless")
    save_encoder(directory)  # its tokenizer is kept
    torch.manual_seed(1)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_task(tmp_path_factory.mktemp("data"), 256)


@pytest.fixture(scope="session")
def make_task() -> Callable[[Path, int], str]:
    return write_task


@pytest.fixture
def content() -> dict[str, Any]:
    from tests.evaluation.report_content import report_content

    return report_content()


@pytest.fixture
def recipe_file(
    encoder: str, pooler_free_encoder: str, tmp_path: Path, make_task: Callable[[Path, int], str]
) -> str:
    from infra.settings.recipe import Recipe
    from infra.settings.sections import Corpus, Evaluation, Teacher, Tracking

    recipe = Recipe(
        name="tiny",
        output=str(tmp_path / "runs"),
        corpus=Corpus(path=("none.txt",)),
        teacher=Teacher(model=encoder),
        evaluation=Evaluation(
            tasks=("SST-2",),
            data=make_task(tmp_path / "data", 64),
            epochs=1,
            max_length=16,
            learning_rate=3e-3,
            elmo_reference=False,
        ),
        tracking=Tracking(enabled=False),
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe.to_yaml())
    student = recipe.run("student").directory
    shutil.copytree(pooler_free_encoder, os.path.join(student, "model"))
    Path(student, "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"ste')
    return str(path)
