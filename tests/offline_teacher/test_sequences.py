from __future__ import annotations

import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from offline_teacher.sequences import open_sequences, read_index, read_token_counts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from infra.errors import UserError
from infra.sections import Corpus, Sequences
from offline_teacher.corpus import Part, parts
from offline_teacher.packing import load_encoder
from offline_teacher.sequence_building import build_part, file_digests, finish_index, outstanding

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


def build(store: str, corpus: Corpus, settings: Sequences, order: int | None = None) -> None:
    listed = parts(corpus, settings.part_bytes)
    todo = outstanding(store, listed, corpus, settings)
    if order is not None:
        random.Random(order).shuffle(todo)
    for index in todo:
        build_part(*pickle.loads(pickle.dumps((store, index, listed[index], corpus, settings))))  # noqa: S301
    finish_index(store, listed, corpus, settings)


def rows(store: str) -> list[list[int]]:
    """Sequences without their padding, after checking that it is padding."""
    sequences = open_sequences(store)
    input_ids, token_count = sequences.rows(range(sequences.count))
    assert all((row[count:] == PAD).all() for row, count in zip(input_ids, token_count, strict=True))
    return [row[:count].tolist() for row, count in zip(input_ids, token_count, strict=True)]


def files(store: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(store, "sequences").iterdir())}


def test_packed(tmp_path, bert):
    build(bert, corpus_of(tmp_path / "c", "a b c d\ne f\ng h a\n"), Sequences(length=8))
    a, b, c, d, e, f, g, h = range(5, 13)
    assert rows(bert) == [[CLS, a, b, c, d, SEP, e, SEP], [CLS, f, SEP, g, h, a, SEP]]


def test_the_last_separator_is_not_doubled_where_the_text_fills_its_sequence(tmp_path, bert):
    build(bert, corpus_of(tmp_path / "c", "a b c d e f\n"), Sequences(length=8))
    assert rows(bert) == [[CLS, 5, 6, 7, 8, 9, 10, SEP]]


def test_one_document_a_sequence(tmp_path, bert):
    settings = Sequences(length=8, packing="document")
    build(bert, corpus_of(tmp_path / "c", "a\nb c\n\u0007\na b c d e f g h\n"), settings)
    assert rows(bert) == [[CLS, 5, SEP], [CLS, 6, 7, SEP], [CLS, 5, 6, 7, 8, 9, 10, SEP]]


def test_names_of_special_tokens_in_a_text_are_text(tmp_path, bert):
    build(bert, corpus_of(tmp_path / "c", "a [SEP] b\n"), Sequences(length=8))
    bracket, close, sep = WORDS.index("["), WORDS.index("]"), WORDS.index("sep")
    assert rows(bert) == [[CLS, 5, bracket, sep, close, 6, SEP]]


def test_names_of_special_tokens_are_unknown_where_the_model_has_them_as_pieces(tmp_path):
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


def test_ids_without_a_token_are_never_drawn(tmp_path):
    vocab = {word: index for index, word in enumerate(WORDS)} | {"z": 40}
    BertTokenizer(vocab=vocab).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert encoder.vocab_size == 41
    assert encoder.special_ids == (*range(5), *range(len(WORDS), 40))


def test_roberta(tmp_path):
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
    RobertaTokenizer(vocab=vocab, merges=[("\u0120", "a")]).save_pretrained(store / "tokenizer")
    build(str(store), corpus_of(tmp_path / "c", "a a\nb\n"), Sequences(length=8))
    input_ids, _ = open_sequences(str(store)).rows(range(1))
    assert input_ids.tolist() == [[0, 5, 8, 2, 6, 2, 1, 1]]


def test_any_order_of_building_gives_the_same_bytes(tmp_path, bert):
    texts = [
        "".join(f"{random.Random(n).choice('abcdefgh')} b\n" for n in range(s, s + 900)) for s in (0, 900)
    ]
    corpus, settings = corpus_of(tmp_path / "c", *texts), Sequences(length=16, part_bytes=1024)
    listed = parts(corpus, 1024)
    build(bert, corpus, settings)
    once = files(bert)
    assert len(once) == 3 * len(listed) + 2
    assert len(listed) > 5
    for path in Path(bert, "sequences").iterdir():
        path.unlink()
    build(bert, corpus, settings, order=1)
    assert files(bert) == once


def test_ids_run_through_the_parts_and_counts_are_of_ordinary_tokens(tmp_path, bert):
    corpus = corpus_of(tmp_path / "c", "".join(f"{'abcdefgh'[n % 8]} zzz\n" for n in range(1000)))
    build(bert, corpus, Sequences(length=10, part_bytes=1024))
    sequences = open_sequences(bert)
    index = sequences.index
    assert len(index.part_sequences) > 3
    input_ids, token_count = sequences.rows(range(sequences.count))
    assert input_ids.shape == (index.count, 10)
    assert input_ids.dtype == np.uint16
    assert index.tokens == token_count.sum()
    assert index.documents == 1000
    for span in (range(0), range(3, 4), range(1, index.count), range(index.count, index.count)):
        got, counts = sequences.rows(span)
        np.testing.assert_array_equal(got, input_ids[span.start : span.stop])
        np.testing.assert_array_equal(counts, token_count[span.start : span.stop])
    with pytest.raises(IndexError):
        sequences.rows(range(index.count, index.count + 1))
    expected = np.bincount(input_ids.ravel(), minlength=len(WORDS))
    expected[:5] = 0
    np.testing.assert_array_equal(read_token_counts(bert), expected)
    assert expected[5:13].sum() == 1000


def test_a_part_opens_with_plain_pyarrow(tmp_path, bert):
    build(bert, corpus_of(tmp_path / "c", "a b\n"), Sequences(length=8))
    path = f"{bert}/sequences/part-00000.arrow"
    table = pa.ipc.open_file(path).read_all()
    assert table.schema.names == ["input_ids", "token_count"]
    assert table["input_ids"].to_pylist() == [[CLS, 5, 6, SEP, 0, 0, 0, 0]]


def test_a_second_run_builds_nothing_and_a_killed_one_goes_on(tmp_path, bert):
    corpus, settings = corpus_of(tmp_path / "c", "a b c\n" * 900), Sequences(length=8, part_bytes=1024)
    listed = parts(corpus, 1024)
    build(bert, corpus, settings)
    once = files(bert)
    assert outstanding(bert, listed, corpus, settings) == []
    assert outstanding(bert, listed, corpus, replace(settings, length=9)) == list(range(len(listed)))
    folder = Path(bert, "sequences")
    (folder / "part-00000.json").unlink()  # killed between data and sidecar
    (folder / "part-00001.json").write_text("{")
    (folder / "part-00002.arrow").write_bytes(once["part-00002.arrow"][:-8])
    (folder / "part-00003.arrow").unlink()
    assert outstanding(bert, listed, corpus, settings) == [0, 1, 2, 3]
    build(bert, corpus, settings)
    assert files(bert) == once


def test_paths_do_not_count_but_text_does(tmp_path, bert):
    settings = Sequences(length=8)
    corpus = corpus_of(tmp_path / "here", "a b c\n")
    build(bert, corpus, settings)
    once = files(bert)
    moved = corpus_of(tmp_path / "there", "a b c\n")
    build(bert, moved, settings)
    assert files(bert) == once
    before = read_index(bert)
    (tmp_path / "there" / "00.txt").write_text("a b d\n")  # same size
    with pytest.raises(UserError, match=r"00\.txt: part 0 of the corpus no longer gives"):
        build(bert, moved, settings)
    (tmp_path / "there" / "01.txt").write_text("a b d\n" * 3000)
    with pytest.raises(UserError, match="made of a corpus of 1 parts"):
        build(bert, moved, replace(settings, part_bytes=1024))
    assert read_index(bert) == before


def test_unfinished_sequences_follow_a_changed_corpus(tmp_path, bert):
    corpus, settings = corpus_of(tmp_path / "c", "a\n"), Sequences(length=8)
    build_part(bert, 0, parts(corpus, settings.part_bytes)[0], corpus, settings)
    (tmp_path / "c" / "00.txt").write_text("b\n")
    build(bert, corpus, settings)
    assert rows(bert) == [[CLS, 6, SEP]]


def test_the_corpus_digest_is_of_text_alone(tmp_path, bert):
    build(bert, corpus_of(tmp_path / "c", "a b\nc\n"), Sequences(length=8))
    digests = [read_index(bert).corpus_digest]
    for name, text, length in (("long", "a b\nc\n", 9), ("cut", "a\nb c\n", 8)):
        store = str(tmp_path / name)
        os.makedirs(store)
        os.symlink(f"{bert}/tokenizer", f"{store}/tokenizer")
        build(store, corpus_of(tmp_path / f"c-{name}", text), Sequences(length=length))
        digests.append(read_index(store).corpus_digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_flipped_bit_is_found_before_a_row_is_given(tmp_path, bert):
    build(bert, corpus_of(tmp_path / "c", "a b c\n" * 50), Sequences(length=8))
    path = Path(bert, "sequences", "part-00000.arrow")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"part-00000\.arrow: is damaged"):
        open_sequences(bert).rows(range(1))
    path.unlink()
    with pytest.raises(UserError, match=r"part-00000\.arrow: is damaged or missing"):
        open_sequences(bert).rows(range(1))


@pytest.mark.parametrize("text", ["", "\n \n", "\x07\n"])
def test_a_corpus_of_nothing(tmp_path, bert, text):
    with pytest.raises(UserError, match="no usable document"):
        build(bert, corpus_of(tmp_path / "c", text), Sequences(length=8))
    assert read_index(bert) is None


def test_unfinished_or_damaged_indexes(tmp_path, bert):
    with pytest.raises(UserError, match=r"has no index\.json"):
        open_sequences(bert)
    with pytest.raises(UserError, match="2 parts are missing, first 0"):
        finish_index(bert, [Part(()), Part(())], Corpus(path=("a",)), Sequences(length=8))
    build(bert, corpus_of(tmp_path / "c", "a\n"), Sequences(length=8))
    Path(bert, "sequences", "token_counts.arrow").write_bytes(b"")
    with pytest.raises(UserError, match="does not match"):
        read_token_counts(bert)
    Path(bert, "sequences", "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is not a JSON object with a digest: delete it and run"):
        open_sequences(bert)


def test_damaged_token_counts_of_a_part_are_not_summed(tmp_path, bert):
    corpus, settings = corpus_of(tmp_path / "c", "a b\n"), Sequences(length=8)
    listed = parts(corpus, settings.part_bytes)
    build_part(bert, 0, listed[0], corpus, settings)
    counts = Path(bert, "sequences", "part-00000.counts.arrow")
    whole = counts.read_bytes()
    for damaged in (whole[:-20], whole.replace(b"\1\0\0\0\0\0\0\0", b"\7\0\0\0\0\0\0\0"), None):
        assert damaged != whole
        counts.unlink() if damaged is None else counts.write_bytes(damaged)
        with pytest.raises(UserError, match=r"counts\.arrow: is damaged or missing; delete .*json and run"):
            finish_index(bert, listed, corpus, settings)
    Path(bert, "sequences", "part-00000.json").unlink()
    build(bert, corpus, settings)
    assert counts.read_bytes() == whole


def test_a_part_of_another_corpus_is_not_numbered(tmp_path, bert):
    """As where two drivers, on an object store, make the parts of different texts at once."""
    settings = Sequences(length=8)
    ours, theirs = corpus_of(tmp_path / "a", "a b\n"), corpus_of(tmp_path / "b", "c d e\n")
    build_part(bert, 0, parts(theirs, settings.part_bytes)[0], theirs, settings)
    with pytest.raises(UserError, match="1 parts are missing"):
        finish_index(bert, parts(ours, settings.part_bytes), ours, settings)


def test_parts_of_an_earlier_attempt_with_more_parts_are_removed(tmp_path, bert):
    corpus = corpus_of(tmp_path / "c", *["a b\n" * 256] * 3)
    many, one = Sequences(length=8, part_bytes=1024), Sequences(length=8)
    for index, part in enumerate(parts(corpus, many.part_bytes)):
        build_part(bert, index, part, corpus, many)
    assert len(files(bert)) == 9
    build(bert, corpus, one)
    assert set(file_digests(bert)) == {f"sequences/{name}" for name in files(bert)}
    assert len(files(bert)) == 5


def test_text_from_the_future_is_text(tmp_path, bert):
    corpus, settings = corpus_of(tmp_path / "c", "a b\n"), Sequences(length=8)
    os.utime(tmp_path / "c/00.txt", (4e9, 4e9))
    build(bert, corpus, settings)
    assert rows(bert) == [[CLS, 5, 6, SEP]]


def test_a_sidecar_of_anything_else_is_made_again(tmp_path, bert):
    corpus, settings = corpus_of(tmp_path / "c", "a b\n"), Sequences(length=8)
    build(bert, corpus, settings)
    Path(bert, "sequences", "part-00000.json").write_text("[]")
    assert outstanding(bert, parts(corpus, settings.part_bytes), corpus, settings) == [0]


def test_strictness_is_of_parts_already_built_too(tmp_path, bert):
    corpus, settings = corpus_of(tmp_path / "c", "a b\n\n"), Sequences(length=8)
    build(bert, corpus, settings)
    with pytest.raises(UserError, match=r"00\.txt, line 2: empty document"):
        build(bert, replace(corpus, strict=True), settings)


def test_tokenizers_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_encoder(str(tmp_path))
    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="has no cls_token"):
        load_encoder(str(tmp_path / "plain"))


def test_a_vocabulary_over_sixteen_bits_takes_uint32(tmp_path):
    store = tmp_path / "store"
    vocab = {word: index for index, word in enumerate([*WORDS, *(f"w{n}" for n in range(70000))])}
    BertTokenizer(vocab=vocab).save_pretrained(store / "tokenizer")
    build(str(store), corpus_of(tmp_path / "c", "w69999\n"), Sequences(length=8))
    input_ids, _ = open_sequences(str(store)).rows(range(1))
    assert input_ids.dtype == np.uint32
    assert input_ids[0, 1] == len(vocab) - 1
