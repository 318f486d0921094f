"""A model whose vocabulary is that of its task's texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evaluation.candidates.models import load_tokenizer
from evaluation.devices.export import load_for_export
from evaluation.devices.trimming import trim
from infra.errors import UserError
from tests.conftest import ROOT

TEACHER = str(ROOT / "infra" / "demo" / "teacher")


def texts() -> list[str]:
    """Words of the demo's vocabulary, the later ones more often."""
    words = [word for word in load_tokenizer(TEACHER).get_vocab() if len(word) > 3 and word.isalpha()]
    words.sort()
    return [" ".join(words[:80]), " ".join(words[40:80]), " ".join(words[60:80])]


def test_frequent_tokens_keep_their_embeddings_and_answers(tmp_path: Path) -> None:
    before, model = load_tokenizer(TEACHER), load_for_export(TEACHER)
    single = sum(len(token.removeprefix("##")) == 1 for token in before.get_vocab())
    size = single + 5 + 40
    trim(TEACHER, texts(), size, str(tmp_path))
    after, trimmed = load_tokenizer(str(tmp_path)), load_for_export(str(tmp_path))
    assert trimmed.config.vocab_size == size == len(after.get_vocab())
    assert len(trimmed.get_input_embeddings().weight) == size
    assert trimmed.config.pad_token_id == after.pad_token_id == after.get_vocab()["[PAD]"]
    frequent = texts()[2]
    old, new = before(frequent), after(frequent)
    assert before.convert_ids_to_tokens(old["input_ids"]) == after.convert_ids_to_tokens(new["input_ids"])
    with torch.inference_mode():
        outputs = [one(torch.tensor([row["input_ids"]]))[0] for one, row in ((model, old), (trimmed, new))]
    torch.testing.assert_close(*outputs)


def test_rare_words_are_spelled_and_never_unknown(tmp_path: Path) -> None:
    before = load_tokenizer(TEACHER)
    single = sum(len(token.removeprefix("##")) == 1 for token in before.get_vocab())
    trim(TEACHER, [], single + 6, str(tmp_path))
    after = load_tokenizer(str(tmp_path))
    words = texts()[0].split()
    assert before.unk_token_id not in before(" ".join(words))["input_ids"]
    for word in words:
        pieces = after.tokenize(word)
        assert "[UNK]" not in pieces
        assert "".join(piece.removeprefix("##") for piece in pieces) == word


def test_control_tokens_get_their_new_ids_everywhere(tmp_path: Path) -> None:
    """In this vocabulary they come last, so every one moves."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    letters = "abc"
    vocabulary = [*letters, *(f"##{letter}" for letter in letters), "cab", "##bab", "bba"]
    vocabulary += ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    source, target = str(tmp_path / "model"), str(tmp_path / "trimmed")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(source)
    BertForMaskedLM(
        BertConfig(vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=8, pad_token_id=vocabulary.index("[PAD]"))
    ).save_pretrained(source)  # fmt: skip
    trim(source, ["cab"], len(vocabulary) - 2, target)
    after, config = load_tokenizer(target), load_for_export(target).config
    row = after("cab", "bba ?", padding="max_length", max_length=9)["input_ids"]
    words = ["[CLS]", "cab", "[SEP]", "b", "##b", "##a", "[UNK]", "[SEP]", "[PAD]"]
    assert after.convert_ids_to_tokens(row) == words
    plain = Tokenizer.from_file(f"{target}/tokenizer.json").encode("cab", "bba ?").ids  # as the file says
    assert plain == row[:-1]
    assert max(row) < config.vocab_size == len(vocabulary) - 2
    assert config.pad_token_id == after.get_vocab()["[PAD]"]
    assert after.mask_token_id == after.get_vocab()["[MASK]"]


@pytest.mark.parametrize("size", [3, 10**6])
def test_a_size_that_cannot_be(size: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vocabulary: must be"):
        trim(TEACHER, [], size, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
