from __future__ import annotations

import os
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from infra.errors import NodeError, UserError
from infra.files.cache import Cache
from infra.settings.sections import Corpus, Sequences
from offline_teacher.corpus.partition import parts
from offline_teacher.sequences.tokenised_parts import (
    Tokenising,
    part_indices,
    problem_summary,
    text_digest,
    token_counts,
)
from offline_teacher.sequences.tokenizer import load_encoder
from offline_teacher.store.parts import read_part
from offline_teacher.store.schema import Layout
from offline_teacher.store.unfinished import finished_parts, read_part_index

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##s", "[", "]", "sep"]
PAD, UNK, CLS, SEP = range(4)


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """An empty store with a tokenizer of letters: a is 5, b is 6 ..."""
    store = tmp_path / "store"
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(
        store / "tokenizer"
    )
    return str(store)


def corpus_of(folder: Path, *texts: str, **fields: object) -> Corpus:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:02d}.txt").write_text(text)
    return Corpus(path=(str(folder / "*.txt"),), **fields)  # type: ignore[arg-type]


def layout(length: int, vocab_size: int = len(WORDS)) -> Layout:
    """Of a store that keeps hidden states alone."""
    return Layout(
        length=length,
        masked=0,
        vocab_size=vocab_size,
        hidden_size=4,
        top_k=0,
        temperatures=(),
        hidden_states="float16",
        positions="all",
    )


def how(
    store: str,
    corpus: Corpus,
    settings: Sequences,
    vocab_size: int = len(WORDS),
    prompt: str = "",
    counted: bool = True,
) -> Tokenising:
    own = layout(settings.length, vocab_size)
    return Tokenising(store, own, corpus, settings, prompt, counted)


def build(
    store: str,
    corpus: Corpus,
    settings: Sequences,
    order: int | None = None,
    vocab_size: int = len(WORDS),
) -> int:
    """Builds what is missing; the number of parts."""
    listed, made = parts(corpus, settings.part_bytes), how(store, corpus, settings, vocab_size)
    todo = made.outstanding("train", listed)
    if order is not None:
        random.Random(order).shuffle(todo)
    for index in todo:
        copy, part = deepcopy((made, listed[index]))  # a worker gets copies, too
        copy.build("train", index, part)
    return len(listed)


def table(store: str, length: int, vocab_size: int = len(WORDS)) -> list[np.ndarray]:
    """input_ids [n, L] and token_count [n] of all parts, one after the other."""
    cache, found = Cache(None, 1 << 20), []
    for number in range(finished_parts(store, "train")):
        index, _ = read_part_index(store, "train", number)
        found.append(read_part(store, layout(length, vocab_size), index, cache))
    return [np.concatenate([part[name] for part in found]) for name in ("input_ids", "token_count")]


def rows(store: str, length: int = 8) -> list[list[int]]:
    """Sequences without their padding, after checking that it is padding."""
    input_ids, token_count = table(store, length)
    assert all((row[count:] == PAD).all() for row, count in zip(input_ids, token_count, strict=True))
    return [row[:count].tolist() for row, count in zip(input_ids, token_count, strict=True)]


def files(store: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(store, "sequences/train").iterdir())}


def test_packed(tmp_path: Path, bert: str) -> None:
    build(bert, corpus_of(tmp_path / "c", "a b c d\ne f\ng h a\n"), Sequences(length=8))
    a, b, c, d, e, f, g, h = range(5, 13)
    assert rows(bert) == [[CLS, a, b, c, d, SEP, e, SEP], [CLS, f, SEP, g, h, a, SEP]]


def test_the_last_separator_is_not_doubled_where_the_text_fills_its_sequence(
    tmp_path: Path, bert: str
) -> None:
    build(bert, corpus_of(tmp_path / "c", "a b c d e f\n"), Sequences(length=8))
    assert rows(bert) == [[CLS, 5, 6, 7, 8, 9, 10, SEP]]


def test_one_document_a_sequence(tmp_path: Path, bert: str) -> None:
    settings = Sequences(length=8, packing="document")
    build(bert, corpus_of(tmp_path / "c", "a\nb c\n\u0007\na b c d e f g h\n"), settings)
    assert rows(bert) == [[CLS, 5, SEP], [CLS, 6, 7, SEP], [CLS, 5, 6, 7, 8, 9, 10, SEP]]


def test_names_of_special_tokens_in_a_text_are_text(tmp_path: Path, bert: str) -> None:
    build(bert, corpus_of(tmp_path / "c", "a [SEP] b\n"), Sequences(length=8))
    bracket, close, sep = WORDS.index("["), WORDS.index("]"), WORDS.index("sep")
    assert rows(bert) == [[CLS, 5, bracket, sep, close, 6, SEP]]


def test_names_of_special_tokens_are_unknown_where_the_model_has_them_as_pieces(tmp_path: Path) -> None:
    """As SentencePiece's models have: pads and separators within a text would be taken for the real ones."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "a", "b", "<mask>"]
    backend = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    for name, more in (("tokenizer", {"unk_token": "<unk>"}), ("without", {})):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, **more)
        tokenizer.save_pretrained(tmp_path / name)
    encoder = load_encoder(str(tmp_path / "tokenizer"))
    assert encoder.encode(["a <pad> </s><s>b<mask>", "ab"]) == [[4, 5, 4, 3, 4, 3, 3, 6, 3], [4, 5, 6]]
    without_unknown = load_encoder(str(tmp_path / "without"))  # its mask token stands for them
    assert without_unknown.encode(["a<pad>b"]) == [[4, 5, 7, 6]]


def test_ids_without_a_token_are_never_drawn(tmp_path: Path) -> None:
    vocab = {word: index for index, word in enumerate(WORDS)} | {"z": 40}
    BertTokenizer(vocab=vocab).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert encoder.vocab_size == 41
    assert encoder.special_ids == (*range(5), *range(len(WORDS), 40))


def test_roberta(tmp_path: Path) -> None:
    store = tmp_path / "store"
    vocab = {
        "<s>": 0,
        "<pad>": 1,
        "</s>": 2,
        "<unk>": 3,
        "<mask>": 4,
        "a": 5,
        "b": 6,
        "\u0120": 7,
        "\u0120a": 8,
    }
    merges = [("\u0120", "a")]  # tokenizers take pairs, whatever transformers' annotation says
    RobertaTokenizer(vocab=vocab, merges=merges).save_pretrained(store / "tokenizer")  # type: ignore[arg-type]
    build(str(store), corpus_of(tmp_path / "c", "a a\nb\n"), Sequences(length=8))
    input_ids, _ = table(str(store), 8)
    assert input_ids.tolist() == [[0, 5, 8, 2, 6, 2, 1, 1]]


def test_any_order_of_building_gives_the_same_bytes(tmp_path: Path, bert: str) -> None:
    texts = [
        "".join(f"{random.Random(n).choice('abcdefgh')} b\n" for n in range(s, s + 900)) for s in (0, 900)
    ]
    corpus, settings = corpus_of(tmp_path / "c", *texts), Sequences(length=16, part_bytes=1024)
    listed = parts(corpus, 1024)
    build(bert, corpus, settings)
    once = files(bert)
    assert len(once) == 3 * len(listed)
    assert len(listed) > 5
    for path in Path(bert, "sequences/train").iterdir():
        path.unlink()
    build(bert, corpus, settings, order=1)
    assert files(bert) == once


def test_counts_are_of_ordinary_tokens_and_every_document_is_there(tmp_path: Path, bert: str) -> None:
    corpus = corpus_of(tmp_path / "c", "".join(f"{'abcdefgh'[n % 8]} zzz\n" for n in range(1000)))
    count = build(bert, corpus, Sequences(length=10, part_bytes=1024))
    assert count > 3
    input_ids, token_count = table(bert, 10)
    assert input_ids.dtype == np.uint16
    assert sum(index.rows for index in part_indices(bert, "train", count)) == len(input_ids)
    indices = [read_part_index(bert, "train", number)[0] for number in range(count)]
    assert sum(index.tokens for index in indices) == token_count.sum()
    assert sum(index.documents for index in indices) == 1000
    expected = np.bincount(input_ids.ravel(), minlength=len(WORDS))
    expected[:5] = 0
    found = token_counts(bert, "train", len(WORDS), Cache(None, 1 << 20))
    np.testing.assert_array_equal(found, expected)
    assert expected[5:13].sum() == 1000


def test_tokens_are_counted_only_where_masking_needs_it(tmp_path: Path, bert: str) -> None:
    corpus, settings = corpus_of(tmp_path / "c", "a b\n"), Sequences(length=8)
    (part,) = parts(corpus, settings.part_bytes)
    index = how(bert, corpus, settings, counted=False).build("train", 0, part)
    assert index.counts is None
    assert set(files(bert)) == {"part-00000.arrow", "part-00000.json"}


def test_a_prompt_stands_before_every_text(tmp_path: Path, bert: str) -> None:
    corpus, settings = corpus_of(tmp_path / "c", "a\nb\n"), Sequences(length=8, packing="document")
    (part,) = parts(corpus, settings.part_bytes)
    how(bert, corpus, settings, prompt="h ").build("train", 0, part)
    assert rows(bert) == [[CLS, 12, 5, SEP], [CLS, 12, 6, SEP]]


def test_what_packing_by_documents_cuts_is_counted(tmp_path: Path, bert: str) -> None:
    """It is what the recipe asks for, so that it is no mistake even where the corpus is strict."""
    corpus = corpus_of(tmp_path / "c", "a b c\n", "a b c d e f g h\na b c d e f g\na\n")
    build(bert, replace(corpus, strict=True), Sequences(length=8, packing="document"))
    assert (
        problem_summary(bert, "train", 1) == "2 documents longer than a sequence, 3 tokens of them left out"
    )


def test_a_part_opens_with_plain_pyarrow(tmp_path: Path, bert: str) -> None:
    build(bert, corpus_of(tmp_path / "c", "a b\n"), Sequences(length=8))
    path = f"{bert}/sequences/train/part-00000.arrow"
    found = pa.ipc.open_file(path).read_all()
    assert found.schema.names == ["input_ids", "token_count"]
    assert found["input_ids"].to_pylist() == [[CLS, 5, 6, SEP, 0, 0, 0, 0]]


def test_a_second_run_builds_nothing_and_a_killed_one_goes_on(tmp_path: Path, bert: str) -> None:
    corpus, settings = corpus_of(tmp_path / "c", "a b c\n" * 900), Sequences(length=8, part_bytes=1024)
    listed = parts(corpus, 1024)
    build(bert, corpus, settings)
    once = files(bert)
    assert how(bert, corpus, settings).outstanding("train", listed) == []
    longer = how(bert, corpus, replace(settings, length=9))
    assert longer.outstanding("train", listed) == list(range(len(listed)))
    folder = Path(bert, "sequences/train")
    (folder / "part-00000.json").unlink()  # killed between data and index
    (folder / "part-00001.json").write_text("{")
    (folder / "part-00002.arrow").write_bytes(once["part-00002.arrow"][:-8])
    (folder / "part-00003.arrow").unlink()
    (folder / "part-00004.counts.arrow").unlink()
    assert how(bert, corpus, settings).outstanding("train", listed) == [0, 1, 2, 3, 4]
    build(bert, corpus, settings)
    assert files(bert) == once


def test_paths_do_not_count_but_text_does(tmp_path: Path, bert: str) -> None:
    settings = Sequences(length=8)
    corpus = corpus_of(tmp_path / "here", "a b c\n")
    build(bert, corpus, settings)
    once = files(bert)
    moved = corpus_of(tmp_path / "there", "a b c\n")
    build(bert, moved, settings)
    assert files(bert) == once
    assert text_digest(parts(moved, 1024)) == text_digest(parts(corpus, 1024))
    (tmp_path / "there" / "00.txt").write_text("a b d\n")  # same size
    index = Path(bert, "tasks/train/e000-p00000-0000.json")
    index.parent.mkdir(parents=True)
    index.write_text("{}")  # a task was made of the text before
    with pytest.raises(UserError, match="the text of part 0 of train has changed since"):
        build(bert, moved, settings)
    assert files(bert) == once
    (tmp_path / "there" / "01.txt").write_text("a b d\n")
    assert text_digest(parts(moved, 1024)) != text_digest(parts(corpus, 1024))


def test_unfinished_sequences_follow_a_changed_corpus(tmp_path: Path, bert: str) -> None:
    corpus, settings = corpus_of(tmp_path / "c", "a\n"), Sequences(length=8)
    build(bert, corpus, settings)
    (tmp_path / "c" / "00.txt").write_text("b\n")
    build(bert, corpus, settings)
    assert rows(bert) == [[CLS, 6, SEP]]


def test_the_digest_of_a_text_is_of_nothing_else(tmp_path: Path, bert: str) -> None:
    build(bert, corpus_of(tmp_path / "c", "a b\nc\n"), Sequences(length=8))
    digests = [read_part_index(bert, "train", 0)[0].text]
    for name, text, length in (("long", "a b\nc\n", 9), ("cut", "a\nb c\n", 8)):
        store = str(tmp_path / name)
        os.makedirs(store)
        os.symlink(f"{bert}/tokenizer", f"{store}/tokenizer")
        build(store, corpus_of(tmp_path / f"c-{name}", text), Sequences(length=length))
        digests.append(read_part_index(store, "train", 0)[0].text)
    assert digests[0] == digests[1] != digests[2]


def test_a_flipped_bit_is_found_before_a_row_is_given(tmp_path: Path, bert: str) -> None:
    build(bert, corpus_of(tmp_path / "c", "a b c\n" * 50), Sequences(length=8))
    path = Path(bert, "sequences/train/part-00000.arrow")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"part-00000\.arrow is damaged"):
        rows(bert)
    path.unlink()
    with pytest.raises(UserError, match=r"part-00000\.arrow"):
        rows(bert)


def test_another_copy_of_a_file_is_refused(tmp_path: Path, bert: str) -> None:
    """One node may have an old one, or a file may be replaced during the pass."""
    corpus = corpus_of(tmp_path / "text", "a b\n" * 20)
    settings = Sequences(length=8)
    (part,) = parts(corpus, settings.part_bytes)
    (tmp_path / "text/00.txt").write_text("a b\n" * 10)
    with pytest.raises(NodeError, match=r"00\.txt: has 40 bytes here, but 80 when the pass began"):
        how(bert, corpus, settings).build("train", 0, part)
    assert not list(Path(bert).rglob("part-*"))


@pytest.mark.parametrize("text", ["\n \n", "\x07\n"])
def test_a_corpus_of_nothing(tmp_path: Path, bert: str, text: str) -> None:
    count = build(bert, corpus_of(tmp_path / "c", text), Sequences(length=8))
    with pytest.raises(UserError, match="the corpus has no usable document"):
        part_indices(bert, "train", count)


def test_damaged_token_counts_of_a_part_are_not_summed(tmp_path: Path, bert: str) -> None:
    corpus, settings = corpus_of(tmp_path / "c", "a b\n"), Sequences(length=8)
    build(bert, corpus, settings)
    counts = Path(bert, "sequences/train/part-00000.counts.arrow")
    whole = counts.read_bytes()
    for damaged in (whole[:-20], whole.replace(b"\1\0\0\0\0\0\0\0", b"\7\0\0\0\0\0\0\0")):
        assert damaged != whole
        counts.write_bytes(damaged)
        with pytest.raises(UserError, match=r"counts\.arrow is damaged .* run `.*verify .* --repair`"):
            token_counts(bert, "train", len(WORDS), Cache(None, 1 << 20))
    counts.unlink()
    build(bert, corpus, settings)
    assert counts.read_bytes() == whole


def test_text_from_the_future_is_text(tmp_path: Path, bert: str) -> None:
    corpus, settings = corpus_of(tmp_path / "c", "a b\n"), Sequences(length=8)
    os.utime(tmp_path / "c/00.txt", (4e9, 4e9))
    build(bert, corpus, settings)
    assert rows(bert) == [[CLS, 5, 6, SEP]]


def test_an_index_of_anything_else_is_made_again(tmp_path: Path, bert: str) -> None:
    corpus, settings = corpus_of(tmp_path / "c", "a b\n"), Sequences(length=8)
    build(bert, corpus, settings)
    Path(bert, "sequences/train/part-00000.json").write_text("[]")
    assert how(bert, corpus, settings).outstanding("train", parts(corpus, settings.part_bytes)) == [0]


def test_strictness_is_of_parts_already_built_too(tmp_path: Path, bert: str) -> None:
    corpus, settings = corpus_of(tmp_path / "c", "a b\n\n"), Sequences(length=8)
    build(bert, corpus, settings)
    with pytest.raises(UserError, match=r"00\.txt, line 2: empty document"):
        build(bert, replace(corpus, strict=True), settings)


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        load_encoder(str(tmp_path))
    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="has no pad_token"):
        load_encoder(str(tmp_path / "plain"))


def test_a_vocabulary_over_sixteen_bits_takes_uint32(tmp_path: Path) -> None:
    store = tmp_path / "store"
    vocab = {word: index for index, word in enumerate([*WORDS, *(f"w{n}" for n in range(70000))])}
    BertTokenizer(vocab=vocab).save_pretrained(store / "tokenizer")
    build(str(store), corpus_of(tmp_path / "c", "w69999\n"), Sequences(length=8), vocab_size=len(vocab))
    input_ids, _ = table(str(store), 8, len(vocab))
    assert input_ids.dtype == np.uint32
    assert input_ids[0, 1] == len(vocab) - 1
