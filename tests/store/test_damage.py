"""No damage to a store goes unnoticed: not by verify, and not by the reader before a number comes out."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import storage
from infra.errors import UserError
from offline_teacher.store.deep import deep_check
from offline_teacher.store.manifest import Declaration, Manifest
from offline_teacher.store.reader import DamagedShard, Shard, Store, open_store
from offline_teacher.store.schema import ShardPlan
from offline_teacher.store.sealed import canonical, seal, unseal
from offline_teacher.store.verify import quarantine, set_aside, set_aside_damaged, verify
from offline_teacher.store.writer import finish_store, missing_shards, write_shard
from tests.store.synthetic import make_columns, make_declaration, make_store, small_layout, write_files

PLAN = ShardPlan(6, 1, 4)
ZEROS = "xxh3-128:" + "0" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(str(tmp_path / "store"), plan=PLAN)


def files_of(root: str) -> dict[str, bytes]:
    """Path below the store -> content, of every file."""
    paths = [path for path in Path(root).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def test_a_thousand_of_a_thousand_bit_flips_are_found(store: Store) -> None:
    generator, files = random.Random(0), files_of(store.root)
    names = sorted(files)
    in_shards = 0
    for _ in range(1000):
        name = generator.choice(names)
        path, data = Path(store.root, name), files[name]
        path.write_bytes(flip(data, generator.randrange(8 * len(data))))
        problems = verify(store.root)
        assert problems, name
        if name != "manifest.json":
            assert name in {problem.file for problem in problems}
        if name.endswith(".arrow"):
            in_shards += 1
            with pytest.raises(DamagedShard, match=r"r000-0000000\d .*verify .* --repair"):
                open_store(store.root).shard(0, int(name[-7]))
        path.write_bytes(data)
    assert in_shards > 100
    assert verify(store.root) == []


def test_the_training_reader_notices_a_flip_in_anything_it_reads(store: Store) -> None:
    for name in (
        "manifest.json",
        "teacher/mlm_head.safetensors",
        "teacher/config.json",
        "tokenizer/vocab.txt",
    ):
        path = Path(store.root, name)
        data = path.read_bytes()
        path.write_bytes(flip(data, 8 * (len(data) // 2)))
        with pytest.raises(UserError, match="damaged"):
            read_everything(store.root)
        path.write_bytes(data)
    read_everything(store.root)


def read_everything(root: str) -> None:
    again = open_store(root)
    again.head()
    again.teacher_config()
    again.tokenizer_files()


def damage_truncated(root: Path) -> None:
    path = root / "shards/r000-00000001.arrow"
    path.write_bytes(path.read_bytes()[:-64])


def damage_extended(root: Path) -> None:
    with (root / "shards/r000-00000001.arrow").open("ab") as file:
        file.write(b"\0")


def damage_missing(root: Path) -> None:
    (root / "shards/r000-00000001.arrow").unlink()


def damage_swapped(root: Path) -> None:
    one, two = root / "shards/r000-00000000.arrow", root / "shards/r000-00000001.arrow"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def damage_swapped_with_sidecars(root: Path) -> None:
    damage_swapped(root)
    one, two = root / "shards/r000-00000000.json", root / "shards/r000-00000001.json"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def damage_duplicate(root: Path) -> None:
    for end in ("arrow", "json"):
        shutil.copy(root / f"shards/r000-00000000.{end}", root / f"shards/r000-00000001.{end}")


def damage_from_another_store(root: Path) -> None:
    make_store(f"{root}-other", plan=PLAN, seed=5)
    for end in ("arrow", "json"):
        shutil.copy(f"{root}-other/shards/r000-00000001.{end}", root / f"shards/r000-00000001.{end}")


SHARD_DAMAGE = [
    damage_truncated,
    damage_extended,
    damage_missing,
    damage_swapped,
    damage_swapped_with_sidecars,
    damage_duplicate,
    damage_from_another_store,
]


@pytest.mark.parametrize("damage", SHARD_DAMAGE, ids=lambda function: function.__name__)
def test_damaged_shards_are_named_and_repaired(store: Store, damage) -> None:  # type: ignore[no-untyped-def]
    before = files_of(store.root)
    damage(Path(store.root))
    problems = verify(store.root)
    assert (0, 1) in {problem.shard for problem in problems}
    with pytest.raises(DamagedShard, match="r000-00000001"):
        open_store(store.root).shard(0, 1)
    set_aside_damaged(store.root, problems)
    remake(store.root)
    assert verify(store.root) == []
    assert files_of(store.root) == before


def remake(root: str) -> None:
    """What a pass that goes on does."""
    declaration = make_declaration(plan=PLAN)
    storage.publish_bytes(f"{root}/declaration.json", seal(declaration.to_json()))
    write_files(root, declaration)
    for replica, index in missing_shards(root, declaration):
        write_shard(root, declaration, replica, index, make_columns(declaration, replica, index))
    finish_store(root)


@pytest.mark.parametrize(
    "name",
    [
        "shards/r000-00000009.arrow",
        "shards/notes.txt",
        "tokenizer/more.txt",
        "sequences/part-1.arrow",
        "core",
    ],
)
def test_foreign_files_are_found_and_moved_away(store: Store, name: str) -> None:
    before = files_of(store.root)
    Path(store.root, name).write_bytes(b"something")
    problems = verify(store.root)
    assert [problem.file for problem in problems] == [name]
    assert set_aside_damaged(store.root, problems) == [name]
    assert Path(quarantine(store.root), name).read_bytes() == b"something"
    finish_store(store.root)
    assert files_of(store.root) == before


@pytest.mark.parametrize(
    "name",
    [
        "declaration.json",
        "manifest.json",
        "recipe.json",
        "recipe.yaml",
        "sequences/index.json",
        "shards/r000-00000000.json",
        "teacher/config.json",
        "teacher/mlm_head.safetensors",
        "tokenizer/vocab.txt",
    ],
)
def test_any_missing_or_altered_file_is_found_and_repaired(store: Store, name: str) -> None:
    before, path = files_of(store.root), Path(store.root, name)
    for damaged in (None, b"", b"{}", before[name] + b"\n", b" " + before[name]):
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        problems = verify(store.root)
        assert name in {problem.file for problem in problems}, damaged
        set_aside_damaged(store.root, problems)
        remake(store.root)
        assert verify(store.root) == []
        assert files_of(store.root) == before


def test_changes_that_json_does_not_see(store: Store) -> None:
    path = Path(store.root, "manifest.json")
    data = path.read_bytes()
    for changed in (
        data.replace(b'"layout": {', b'"layout":\t{'),
        data.replace(b'"plan"', b'"\\u0070lan"'),
        data.replace(b" 1.0,", b" 1.00,"),
        data.replace(b'"digest": "xxh3-128:', b'"digest": "x", "digest": "xxh3-128:'),
    ):
        assert changed != data
        path.write_bytes(changed)
        assert [problem.file for problem in verify(store.root)] == ["manifest.json"]
        with pytest.raises(UserError, match="does not match the digest"):
            open_store(store.root)


def test_one_shard_set_aside_makes_the_store_incomplete(store: Store) -> None:
    before = files_of(store.root)
    set_aside(store.root, 0, 1)
    with pytest.raises(UserError, match="1 of 2 shards are missing"):
        open_store(store.root)
    assert missing_shards(store.root, store.manifest.declaration) == [(0, 1)]
    remake(store.root)
    assert files_of(store.root) == before


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.data())
def test_fuzzed_manifests_with_a_right_digest_give_one_line(data: st.DataObject) -> None:
    declaration = make_declaration(plan=PLAN)
    digest = "xxh3-128:" + "0" * 32
    value = Manifest(declaration, [digest] * 2, {"declaration.json": digest}).to_json()
    where: dict = value
    while True:  # somewhere in the tree a member is replaced
        key = data.draw(st.sampled_from(sorted(where)))
        if not isinstance(where[key], dict) or not where[key] or data.draw(st.booleans()):
            break
        where = where[key]
    unrestricted = (
        key == "fingerprint" or where is not value and "teacher" in str(where) or key in ("format", "seed")
    )
    where[key] = data.draw(json_values)
    problem = None
    try:
        manifest = Manifest.from_bytes(seal(value))
    except ValueError as error:
        problem = str(error)
    if problem is None:
        assert unrestricted or manifest.to_json() == value
    else:
        assert len(problem) < 2000
        assert "\n" not in problem


@given(st.binary(max_size=300))
def test_random_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(ValueError, match="JSON|digest"):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: v["files"].update({"tokenizer/../../passwd": ZEROS}), "not a path of a store"),
        (lambda v: v["files"].update({"/etc/passwd": ZEROS}), "not a path of a store"),
        (lambda v: v["files"].update({"tokenizer/.ssh": ZEROS}), "not a path of a store"),
        (lambda v: v["files"].update({"shards/x": ZEROS}), "not a path of a store"),
        (lambda v: v["plan"].update(sequences=10**18), "sequences"),
        (lambda v: v["plan"].update(sequences=10**12), "lists 2 shards"),
        (lambda v: v["plan"].update(samples_per_shard=0), "samples_per_shard"),
        (lambda v: v["plan"].update(replicas=True), "replicas"),
        (lambda v: v["layout"].update(hidden_size=10**9), "hidden_size"),
        (lambda v: v["layout"].update(extra=1), "unknown extra"),
        (lambda v: v["special"].update(pad=40), "special.pad"),
        (lambda v: v.update(format_version=2), "format_version"),
        (lambda v: v["shard_digests"].append("xxh3-128:" + "0" * 32), "lists 3 shards"),
        (lambda v: v["shard_digests"].__setitem__(0, "xxh3-128:" + "A" * 32), "shard_digests"),
        (lambda v: v.pop("files"), "files"),
        (lambda v: v.pop("special"), "lacks special"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_refused(store: Store, change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    path = Path(store.root, "manifest.json")
    value = unseal(path.read_bytes())
    change(value)
    path.write_bytes(seal(value))
    with pytest.raises(UserError, match=sentence) as caught:
        open_store(store.root)
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 10_000, b"NaN"])
def test_hostile_json_gives_one_line(store: Store, data: bytes) -> None:
    Path(store.root, "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_store(store.root)
    assert [problem.file for problem in verify(store.root)] == ["manifest.json"]


@pytest.mark.parametrize("column", ["topk_ids", "topk_logits", "logsumexp", "hidden_states"])
@pytest.mark.parametrize("positions", ["all", "masked"])
def test_deep_check_names_the_column_that_does_not_fit(tmp_path: Path, column: str, positions: str) -> None:
    """Numbers that are possible, but of another sample."""
    layout = small_layout(positions=positions, vocab_size=500, hidden_size=32)
    store = make_store(str(tmp_path), layout)
    shard = store.shard(0, 0)
    assert deep_check(shard, store.head(), layout, "bfloat16") == []
    columns = dict(shard.columns)
    columns[column] = np.roll(columns[column], 1, axis=1)
    found = deep_check(Shard(0, 0, columns), store.head(), layout, "bfloat16")
    assert all(problem.shard == (0, 0) for problem in found)
    names = {problem.column for problem in found}
    assert column in names or (column == "hidden_states" and names)


def test_deep_check_of_a_sample_of_positions(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    columns = dict(store.shard(0, 0).columns)
    columns["logsumexp"] = columns["logsumexp"] + np.float32(0.9)
    assert deep_check(Shard(0, 0, columns), store.head(), store.layout, "float32", positions=1)


def test_progress_counts_shards(store: Store) -> None:
    seen: list[tuple[int, int]] = []
    verify(store.root, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_a_damaged_declaration_is_one_line(store: Store) -> None:
    os.remove(Path(store.root, "manifest.json"))
    Path(store.root, "declaration.json").write_bytes(canonical({"digest": 1}))
    with pytest.raises(UserError, match=r"declaration\.json"):
        open_store(store.root)


def test_declaration_round_trip() -> None:
    declaration = make_declaration()
    assert Declaration.from_json(unseal(seal(declaration.to_json()))) == declaration
