"""The teacher pass and the evaluation give one text the same ids, whatever control tokens it spells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from evaluation.candidates.models import load_tokenizer
from evaluation.devices import latency
from evaluation.kinds.registry import kind_of
from evaluation.sources.catalogue import find_task
from evaluation.tasks import answer_spans
from evaluation.tasks.answer_spans import Question
from evaluation.tasks.task import Split
from offline_teacher.sequences.tokenizer import load_encoder

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ADDED = ["[URL]", "[USER]"]
TEXTS = (
    "see [URL] by [USER]",
    "x[URL]y",
    "a [SEP] b [CLS] [PAD] [MASK] [UNK]",
    "a </s> b <s> <pad><mask> <unk>",
    "[emo] plain [SEP][URL]</s>[URL]",
)


def fast(backend: Tokenizer, names: list[str], ends: tuple[int, int]) -> PreTrainedTokenizerBase:
    """With the control tokens ``names`` (from CLS to MASK), two named special tokens more and two others."""
    cls, pad, sep, unk, mask = names
    tokens = {"cls_token": cls, "pad_token": pad, "sep_token": sep, "unk_token": unk, "mask_token": mask}
    backend.post_processor = processors.BertProcessing((sep, ends[1]), (cls, ends[0]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.add_tokens([AddedToken("[emo]", special=True), AddedToken("plain")])
    return tokenizer


def word_piece() -> PreTrainedTokenizerBase:
    letters = [*"abexyrsu[]<>/", "##s", "##e", "see", "by", "sep", "url", "SEP", "URL", "pad"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(BERT + letters)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return fast(backend, ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"], (2, 3))


def byte_level() -> PreTrainedTokenizerBase:
    names = ROBERTA + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(names)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return fast(backend, ROBERTA, (0, 2))


def sentence_piece() -> PreTrainedTokenizerBase:
    """Its model knows the names of its control tokens as pieces, as XLM-RoBERTa's does."""
    pieces = [*ROBERTA, "\u2581", *"abesyxr[]SEPURL/<>"]
    backend = Tokenizer(
        models.Unigram([(piece, -float(n)) for n, piece in enumerate(dict.fromkeys(pieces))], unk_id=3)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return fast(backend, ROBERTA, (0, 2))


@pytest.fixture(params=[word_piece, byte_level, sentence_piece])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    make: Callable[[], PreTrainedTokenizerBase] = request.param
    make().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_pass_and_evaluation_agree(directory: str) -> None:
    passed = load_encoder(directory).encode(TEXTS)
    tokenizer = load_tokenizer(directory)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    expected = [[cls, *ids, sep] for ids in passed]
    rows = Split([(text,) for text in TEXTS], None)
    task = find_task("SST-2")
    assert kind_of(task).encode(tokenizer, task, rows, 512).input_ids == expected
    timed = latency.batches(tokenizer, rows.texts, 1, 512)
    assert [batch["input_ids"][0].tolist() for batch in timed] == expected
    for text, ids in zip(TEXTS, passed, strict=True):
        windows = answer_spans.encode(tokenizer, [Question("0", "a", text, ("a",), (0,))], 512)
        (row,) = windows.encoded.input_ids
        assert row[-len(ids) - 1 : -1] == ids


def test_control_tokens_in_a_text_are_never_the_real_ones(directory: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    control = {
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.pad_token_id,
        tokenizer.mask_token_id,
    }
    for ids in load_encoder(directory).encode(TEXTS):
        assert control.isdisjoint(ids)


def test_other_special_tokens_keep_the_teachers_ids(directory: str) -> None:
    """Where a text spells no control token, its ids are those of the tokenizer as it is."""
    encoder, tokenizer = load_encoder(directory), AutoTokenizer.from_pretrained(directory)
    texts = ["see [URL] by [USER]", "x[URL]y", "[emo] plain b"]
    assert encoder.encode(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
    url, user = map(tokenizer.convert_tokens_to_ids, ADDED)
    assert [token for token in encoder.encode(texts[:1])[0] if token in (url, user)] == [url, user]
    assert {url, user} <= set(encoder.special_ids)  # never masked, as transformers' collator does


def test_a_tokenizer_is_saved_with_the_same_ids(directory: str, tmp_path: Path) -> None:
    """A fine-tuned model's directory holds the tokenizer that evaluation used."""
    tokenizer = load_tokenizer(directory)
    tokenizer.save_pretrained(tmp_path / "again")
    assert load_encoder(str(tmp_path / "again")).encode(TEXTS) == load_encoder(directory).encode(TEXTS)
