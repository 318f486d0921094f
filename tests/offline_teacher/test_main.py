"""The commands as a user types them: refusals in one line, a complete store left alone, repair, inspect."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from infra.errors import UserError
from infra.settings.recipe_file import load_recipe
from offline_teacher.main import _parser, main
from offline_teacher.running import pass_record
from offline_teacher.running.teacher_pass import parts_of
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.store import open_store
from tests import starts
from tests.offline_teacher.local_pool import LocalCluster
from tests.offline_teacher.stores import contents, finish, start
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose store, of training and held-out text, is complete. It was made without Ray, which is
    the subject of other tests."""
    directory = tmp_path_factory.mktemp("main")
    text, model = write_text(directory / "text.txt", 60), save_bert(directory / "model")
    held_out = write_text(directory / "held_out.txt", 20, seed=1)
    recipe = write_recipe(
        directory,
        text,
        model,
        corpus={"path": [str(text)], "validation_path": [str(held_out)]},
        masking={"epochs": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offline_teacher.cluster.pool.Cluster", LocalCluster)
        assert main(["run", "--recipe", str(recipe)]) == 0
    return recipe


def store_of(recipe: Path) -> Path:
    return recipe.parent / "runs/tiny/store"


@pytest.mark.parametrize(
    "words",
    [
        "verify STORE --rerun 1 a.b=1 c.d=2",
        "verify STORE a.b=1 --rerun 1 c.d=2",
        "verify --rerun 1 STORE a.b=1 c.d=2",
        "plan a.b=1 --recipe R c.d=2",
        "run --recipe R a.b=1 c.d=2",
    ],
)
def test_options_and_overrides_come_in_any_order(words: str) -> None:
    options = vars(_parser().parse_args(words.split()))
    assert options["overrides"] == ["a.b=1", "c.d=2"]
    assert (options.get("store"), options.get("rerun")) in (("STORE", 1), (None, None))


def test_complete_store_starts_no_ray(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    before = contents(store_of(made))
    assert main(["run", "--recipe", str(made)]) == 0
    assert "complete" in capsys.readouterr().out
    assert contents(store_of(made)) == before


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    """A copy of the same that was run once more, in a directory of its own, to be changed."""
    shutil.copytree(made.parent, tmp_path / "copy")
    recipe = tmp_path / "copy" / made.name
    recipe.write_text(recipe.read_text().replace(str(made.parent), str(recipe.parent)))
    assert main(["run", "--recipe", str(recipe)]) == 0
    return recipe


def is_recorded(path: Path) -> bool:
    recipe = load_recipe(str(path))
    return pass_record.is_recorded(recipe, pass_record.inputs_digest(recipe, parts_of(recipe)))


def rewrite(path: Path) -> None:
    """Its content stays, only the time of its last change is another."""
    path.write_bytes(path.read_bytes())


CHANGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda directory: (directory / "runs/tiny/store/manifest.json").unlink(),
    "a manifest cut off": lambda directory: os.truncate(directory / "runs/tiny/store/manifest.json", 100),
    "the weights": lambda directory: rewrite(directory / "model/model.safetensors"),
    "the tokenizer": lambda directory: rewrite(directory / "model/tokenizer.json"),
    "the text": lambda directory: rewrite(directory / "text.txt"),
    "held-out text": lambda directory: rewrite(directory / "held_out.txt"),
    "a damaged record": lambda directory: os.truncate(directory / "runs/tiny/pass.json", 100),
    "an empty record": lambda directory: (directory / "runs/tiny/pass.json").write_text("{}"),
    "no record": lambda directory: (directory / "runs/tiny/pass.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_any_change_the_pass_looks_closely(finished: Path, change: str) -> None:
    assert is_recorded(finished)
    CHANGES[change](finished.parent)
    assert not is_recorded(finished)


def test_another_store_of_the_same_name_is_not_the_recorded_one(finished: Path) -> None:
    """A recipe that is pointed elsewhere has a store to make."""
    recipe = load_recipe(str(finished), [f"store.path={finished.parent}/elsewhere"])
    assert not pass_record.is_recorded(recipe, pass_record.inputs_digest(recipe, parts_of(recipe)))


def test_a_finished_pass_loads_nothing_heavy_and_writes_nothing(finished: Path) -> None:
    before = contents(store_of(finished))
    ended = starts.start([*starts.COMMANDS["teacher run"], "--recipe", str(finished), "train.seed=7"])
    assert ended.returncode == 0, ended.stderr
    assert "complete, nothing to do" in ended.stdout
    assert not starts.loaded(ended) & starts.HEAVY
    assert contents(store_of(finished)) == before


def test_what_tracking_has_not_sent_is_not_forgotten(finished: Path) -> None:
    finished.write_text(finished.read_text().replace("enabled: false", "enabled: true"))
    record = finished.parent / "runs/tiny/pass.json"
    recipe = load_recipe(str(finished))
    inputs = pass_record.inputs_digest(recipe, parts_of(recipe))
    record.write_text(json.dumps({**json.loads(record.read_text()), "inputs": inputs}))
    assert is_recorded(finished)
    (record.parent / "tracking-student.jsonl").write_text("")
    assert not is_recorded(finished)


def test_speed_settings_may_differ(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    assert main(["run", "--recipe", str(made), "teacher.workers=2", "teacher.task_attempts=1"]) == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("masking.seed=3", "masking.seed: 0 -> 3"),
        ("store.top_k=4", "store.top_k: 5 -> 4"),
        ("teacher.dtype=float32", "teacher.dtype: 'bfloat16' -> 'float32'"),
        ("sequences.length=12", "sequences.length: 16 -> 12"),
        ("teacher.model={other}", "teacher: 'xxh3"),
        ("corpus.path={text}", "corpus"),
    ],
)
def test_another_recipe_is_refused_and_nothing_changes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, words: str
) -> None:
    """Before Ray is started."""
    other = save_bert(tmp_path / "other", seed=5)
    text = write_text(tmp_path / "text.txt", 60, seed=7)
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    before = contents(store_of(made))
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        main(["run", "--recipe", str(made), override.format(other=other, text=text)])
    assert "\n" not in str(caught.value)
    assert contents(store_of(made)) == before


def test_verify_finds_and_repair_restores(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With real workers, and processes that check side by side."""
    assert main(["verify", str(store_of(made)), "--deep", "--rerun", "2", "--workers", "2"]) == 0
    store = tmp_path / "store"
    shutil.copytree(store_of(made), store)
    before = contents(store)
    shard = min((store / "shards/train/e001-p00000-0001").glob("*.arrow"))
    for path in (shard, store / "sequences/train/part-00000.arrow", store / "teacher/model.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    (store / "tokenizer/tokenizer.json").unlink()
    capsys.readouterr()
    assert main(["verify", str(store)]) == 3
    output = capsys.readouterr().out
    for name in (shard.name, "part-00000.arrow", "model.safetensors", "tokenizer.json"):
        assert name in output
    assert main(["verify", str(store), "--repair"]) == 0
    assert contents(store) == before


def test_repair_needs_a_recipe_it_can_trust(made: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(store_of(made), store)
    (store / "recipe.yaml").write_text((store / "recipe.yaml").read_text().replace("top_k: 5", "top_k: 7"))
    (store / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"store\.top_k: 5 -> 7.*give the recipe"):
        main(["verify", str(store), "--repair"])
    assert main(["verify", str(store), "--repair", "--recipe", str(made)]) == 0


@pytest.mark.slow
def test_added_tokens_and_rows_without_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher with [URL] among its tokens and a thousand rows of embeddings more than tokens."""
    model = save_bert(tmp_path / "model", vocab_size=1100)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[URL]"]})
    tokenizer.save_pretrained(model)
    text = write_text(tmp_path / "text.txt", 60)
    text.write_text("".join(f"[URL] [SEP] {line}\n" for line in text.read_text().splitlines()))
    recipe = write_recipe(tmp_path, text, model, sequences={"length": 16, "packing": "document"})
    code, output = finish(start(recipe))
    assert code == 0, output
    store = open_store(str(store_of(recipe)))
    reader = BlockReader(store, "train", ["input_ids", "masked_labels"])
    blocks = [reader.rows(0, block) for block in range(store.splits["train"].plan.blocks_per_epoch)]
    ids, labels = (
        np.concatenate([block[name] for block in blocks]) for name in ("input_ids", "masked_labels")
    )
    url = tokenizer.convert_tokens_to_ids("[URL]")
    assert (ids[:, 1] == url).all()
    assert ((ids == tokenizer.sep_token_id).sum(axis=1) == 1).all()
    assert (labels != url).all()
    assert ids.max() < len(tokenizer) < store.layout.vocab_size  # random replacements are tokens
    assert main(["verify", str(store_of(recipe)), "--deep"]) == 0
    assert main(["inspect", str(store_of(recipe)), "--sample", "0"]) == 0
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert "id 1" in shown


def test_held_out_text_is_masked_once(made: Path) -> None:
    store = open_store(str(store_of(made)))
    assert [store.splits[name].plan.masking_epochs for name in ("train", "validation")] == [2, 1]
    names = [path.name for path in store_of(made).glob("tasks/validation/*")]
    assert names
    assert all(name.startswith("e000-") for name in names)


def test_a_store_of_its_own_place_needs_no_output(made: Path, tmp_path: Path) -> None:
    """The store is complete in itself: moved elsewhere it is read without recipe, text or teacher."""
    store = tmp_path / "moved"
    shutil.copytree(store_of(made), store)
    (store / "recipe.yaml").unlink()
    assert main(["verify", str(store), "--deep"]) == 0
    assert main(["inspect", str(store)]) == 0
