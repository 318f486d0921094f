"""Tests of the comparison of storage formats: their contents, flipped bits, and the page that shows both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from docs import storage_table
from offline_teacher.store.schema import Columns, Layout
from offline_teacher.store.store import DamagedStore, open_store
from tests.benchmarks import bench_storage_formats
from tests.benchmarks.bench_storage_formats import BASE, Size, measure, rows, training_order
from tests.benchmarks.bit_flips import count_outcomes, flipped, outcome
from tests.benchmarks.random_outputs import LOGIT_DEVIATION, make_outputs
from tests.benchmarks.storage_formats import (
    Format,
    JsonFormat,
    RecordFormat,
    StoreFormat,
    TarFormat,
    UnreadableSample,
)

LAYOUT = Layout(
    length=16,
    masked=3,
    vocab_size=1000,
    hidden_size=24,
    top_k=8,
    temperatures=(1.0, 2.0),
    hidden_states="float16",
    positions="all",
)
SAMPLES = 6
FORMATS: dict[str, Format] = {
    "store": StoreFormat(LAYOUT),
    "int8": StoreFormat(replace(LAYOUT, hidden_states="int8")),
    "tar": TarFormat(LAYOUT),
    "tar of pairs": TarFormat(LAYOUT, 2),
    "tar with checksum": TarFormat(LAYOUT, checksum=True),
    "records": RecordFormat(LAYOUT),
    "JSON": JsonFormat(LAYOUT),
}


def written(name: str, directory: Path) -> Callable[[], Columns]:
    """Writes the outputs in a format. Returns a function that opens the files and reads all samples."""
    one = FORMATS[name]
    one.write(directory, one.kept(make_outputs(LAYOUT, SAMPLES)))
    return lambda: read(name, directory, list(range(SAMPLES)))


def read(name: str, directory: Path, numbers: list[int]) -> Columns:
    with FORMATS[name].opened(directory) as reader:
        return {key: np.array(values) for key, values in reader(np.array(numbers)).items()}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_returns_the_outputs_within_its_rounding(name: str, tmp_path: Path) -> None:
    written(name, tmp_path)
    outputs, numbers = make_outputs(LAYOUT, SAMPLES), [4, 0, 5, 2]
    found = read(name, tmp_path, numbers)
    steps = found.pop("hidden_scale", None)
    assert found.keys() == outputs.keys() - {"sequence_id"}
    for column, values in found.items():
        expected = outputs[column][numbers]
        assert values.shape == expected.shape
        if expected.dtype.kind != "f" or column == "logsumexp" or name in ("records", "JSON"):
            np.testing.assert_array_equal(values, expected)
        elif column == "hidden_states" and steps is not None:
            assert (np.abs(values * steps[..., None] - expected) <= 0.5001 * steps[..., None]).all()
        else:
            assert values.dtype == np.float16
            np.testing.assert_allclose(values.astype(np.float32), expected, rtol=2**-11, atol=2**-24)


def test_the_outputs_have_the_distribution_of_sorted_normal_logits() -> None:
    """The shortcut for the top k of a vocabulary agrees with drawing all logits and sorting them."""
    outputs = make_outputs(LAYOUT, 100)
    logits = np.random.default_rng(1).normal(0, LOGIT_DEVIATION, (1600, LAYOUT.vocab_size))
    drawn = -np.sort(-logits)[:, : LAYOUT.top_k]
    made = outputs["topk_logits"].reshape(1600, -1)
    np.testing.assert_allclose(made.mean(0), drawn.mean(0), atol=0.15)
    assert (np.diff(made) <= 0).all()
    for slot, temperature in enumerate(LAYOUT.temperatures):
        expected = np.log(np.exp(logits / temperature).sum(1)).mean()
        assert outputs["logsumexp"][..., slot].mean() == pytest.approx(expected, abs=0.1)
    ids = outputs["topk_ids"].reshape(1600, -1)
    assert all(len(set(row)) == LAYOUT.top_k for row in ids.tolist())
    assert ids.max() < LAYOUT.vocab_size
    assert outputs["hidden_states"].std() == pytest.approx(0.7, abs=0.3)


def test_the_order_of_training_is_shuffled_and_complete() -> None:
    order = training_order(BASE, 300)  # several blocks
    assert sorted(order) == list(range(300))
    assert (np.diff(order) == 1).mean() < 0.1


def test_a_flip_in_any_column_of_the_store_names_its_sample(tmp_path: Path) -> None:
    read_all = written("store", tmp_path)
    store = open_store(str(tmp_path))
    index = store.task_index("train", 0)
    (shard,) = FORMATS["store"].payload(tmp_path)
    frame = index.frames[SAMPLES]
    for name, column in store.layout.columns().items():
        place = index.shards[0].start + frame.offsets[name] + 3 * column.bytes
        with flipped(shard, 8 * place + 1):
            if name == "sequence_id":  # which training does not read
                read_all()
                continue
            with pytest.raises(DamagedStore) as error:
                read_all()
        named = f"sample 3 (sequence 3), column {name}:"
        assert (named if name != "digests" else "column digests:") in str(error.value)
    assert outcome(read_all, read_all()) == "unchanged"


@pytest.mark.parametrize("name", ["tar with checksum", "JSON"])
def test_other_readers_name_the_sample_that_they_cannot_read(name: str, tmp_path: Path) -> None:
    read_all = written(name, tmp_path)
    (path,) = FORMATS[name].payload(tmp_path)
    data = path.read_bytes()
    if name == "JSON":
        place = [i for i, byte in enumerate(data) if byte == ord("\n")][2] - 1  # the last brace of sample 2
    else:
        place = data.index(b"00000002.pt.zst") + 512 + 1000  # in the compressed member after its header
    with flipped(path, 8 * place), pytest.raises(UnreadableSample, match=r"^sample 2: "):
        read_all()


def test_a_flip_in_a_record_changes_one_number_and_nobody_notices(tmp_path: Path) -> None:
    read_all = written("records", tmp_path)
    expected = read_all()
    (path,) = FORMATS["records"].payload(tmp_path)
    with flipped(path, 8 * (path.stat().st_size // SAMPLES) * 2 - 2):  # the end of sample 1
        found = read_all()
        assert outcome(read_all, expected) == "silent"
    changed = np.argwhere(found["hidden_states"] != expected["hidden_states"])
    assert changed.tolist() == [[1, LAYOUT.length - 1, LAYOUT.hidden_size - 1]]


def test_only_with_its_checksum_does_zstd_notice_every_change(tmp_path: Path) -> None:
    counts = {}
    for name in ("tar", "tar with checksum"):
        (tmp_path / name).mkdir()
        read_all = written(name, tmp_path / name)
        counts[name] = count_outcomes(FORMATS[name].payload(tmp_path / name), read_all, 150)
    assert counts["tar"]["silent"] > 10
    assert counts["tar with checksum"]["silent"] == 0
    assert counts["tar with checksum"]["named"] > 50


def raising(message: str) -> Callable[[], Columns]:
    def read() -> Columns:
        raise ValueError(message)

    return read


def test_outcomes_of_hand_made_readers() -> None:
    expected = {"a": np.array([1.0, np.nan]), "b": np.array([3])}
    assert outcome(lambda: {**expected, "a": np.array([1.0, np.nan])}, expected) == "unchanged"
    assert outcome(lambda: {**expected, "a": np.array([1.0, 2.0])}, expected) == "silent"
    same_bytes = expected["b"].view(np.float64)
    assert outcome(lambda: {**expected, "b": same_bytes}, expected) == "silent"
    assert outcome(lambda: {**expected, "b": expected["b"][None]}, expected) == "silent"
    assert outcome(lambda: {"a": expected["a"]}, expected) == "silent"
    assert outcome(raising("task 0, sample 3 (sequence 3), column a"), expected) == "named"
    assert outcome(raising("block 0 of the shard, column digests"), expected) == "noticed"
    assert outcome(raising("a sample is damaged"), expected) == "noticed"


def test_a_flip_changes_one_bit_and_is_undone_also_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x00\xff\x00")
    with pytest.raises(KeyError), flipped(path, 11):
        assert path.read_bytes() == b"\x00\xf7\x00"
        raise KeyError
    assert path.read_bytes() == b"\x00\xff\x00"


def test_flips_are_counted_in_proportion_to_the_bytes_of_the_files(tmp_path: Path) -> None:
    """A hand-made format: the reader refuses any change of the first file, returns the second, and ignores
    the third."""
    files = [tmp_path / name for name in ("checked", "plain", "ignored")]
    for path, size in zip(files, (100, 200, 700), strict=True):
        path.write_bytes(bytes(size))

    def read() -> Columns:
        if any(files[0].read_bytes()):
            raise ValueError("sample 0 is damaged")
        return {"plain": np.frombuffer(files[1].read_bytes(), np.uint8)}

    counts = count_outcomes(files, read, 1000)
    assert counts == count_outcomes(files, read, 1000)
    assert sum(counts.values()) == 1000
    assert counts["noticed"] == 0
    assert counts["named"] == pytest.approx(100, abs=40)
    assert counts["silent"] == pytest.approx(200, abs=55)


def test_a_whole_measurement_makes_rows_a_page_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_storage_formats, "BATCH", 4)
    (tmp_path / "files").mkdir()
    result = measure(tmp_path / "files", Size(12, 12, 4, 1, 1, 2, 60), LAYOUT)
    assert len(list(rows(result))) == 11 * 5 + 5
    flips = {one["format"]: one for one in result["flips"]}
    assert flips["store"]["silent"] == 0
    assert flips["store"]["named"] > 30
    assert flips["float32 records"]["silent"] == 60
    sizes = {(one["holds"], one["format"]): one["bytes_per_token"] for one in result["formats"]}
    text = 4 * (1 + LAYOUT.length + 2 * LAYOUT.masked) / LAYOUT.length
    assert sizes["hidden states", "float32 records"] == pytest.approx(4 * 24 + text)
    assert sizes["top-8", "float32 records"] == pytest.approx(4 * (2 * 8 + 2) + text)
    json_lines, kept = JsonFormat(replace(LAYOUT, top_k=0, temperatures=())), tmp_path / "four samples"
    kept.mkdir()
    json_lines.write(kept, json_lines.kept(make_outputs(json_lines.layout, 4)))
    size = (kept / json_lines.file).stat().st_size / (4 * LAYOUT.length)
    assert sizes["hidden states", "JSON lines"] == pytest.approx(size, rel=0.02)
    assert "| float32 records | 0 | 0 | 60 | 0 |" in storage_table.page(result)
    storage_table.draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_is_up_to_date_and_its_words_hold() -> None:
    result = json.loads(storage_table.RESULT.read_text())
    stale = "storage.md is not up to date: run python -m docs.storage_table"
    assert storage_table.PAGE.read_text() == storage_table.page(result), stale
    flips = {one["format"]: one for one in result["flips"]}
    assert flips["store"]["silent"] == flips["zstd torch.save in tar, with checksum"]["silent"] == 0
    assert flips["float32 records"]["silent"] == flips["float32 records"]["flips"]
    for holds in ("hidden states", "top-64"):
        known = {one["format"]: one for one in result["formats"] if one["holds"] == holds}
        store, tar, records = known["store"], known["zstd torch.save in tar"], known["float32 records"]
        assert tar["bytes_per_token"] < store["bytes_per_token"] < records["bytes_per_token"]
        assert records["write_tokens_per_s"] > store["write_tokens_per_s"]
        for key in ("read_tokens_per_s", "shuffled_tokens_per_s"):
            slow = max(tar[key], known["JSON lines"][key])
            assert records[key] > store[key] > 3 * slow
