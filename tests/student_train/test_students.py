"""Several students of one store: by one recipe or by several, wherever the store is, with any loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from infra.errors import UserError
from infra.files import storage
from infra.settings.recipe_file import load_recipe
from offline_teacher.store.store import open_store
from student_train.engine import world as worlds
from student_train.engine.world import World
from student_train.objectives import triple_loss
from student_train.student.model import build_student
from tests.student_train.tiny_run import command, history, logged, make_run, student, validated, weights

NO_VOCABULARY = {"alpha_ce": 0.0, "alpha_mlm": 0.0}
RELATIONS = {**NO_VOCABULARY, "alpha_cos": 0.0, "alpha_relation": 1.0}
FAMILY: dict[str, dict[str, Any]] = {
    "half": {},
    "encoder": {"train": {**NO_VOCABULARY, "alpha_relation": 1.0}},
    "narrow": {"student": {"hidden_size": 8, "init": "random"}, "train": RELATIONS},
}


def family(root: Path, students: dict[str, Any], **train: Any) -> None:
    """Writes these students into the recipe."""
    path = root / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["train"] |= train
    path.write_text(yaml.safe_dump({**tree, "students": students}))


def alone_recipe(root: Path, directory: Path, name: str, store: str) -> None:
    """Writes the recipe of one student to a directory of its own, without corpus and teacher."""
    tree = yaml.safe_load((root / "recipe.yaml").read_text())
    own = tree.pop("students")[name]
    tree |= {"output": str(directory / "runs"), "store": {"path": store}}
    for section in ("student", "train"):
        tree[section] = {**tree[section], **own.get(section, {})}
    tree["train"]["cache_dir"] = str(directory / "cache")
    directory.mkdir()
    (directory / "recipe.yaml").write_text(yaml.safe_dump(tree))


def published(root: Path, name: str) -> dict[str, bytes]:
    """Returns weights and configuration; the model card is left out because it contains names."""
    model = student(root, name) / "model"
    return {file: (model / file).read_bytes() for file in ("model.safetensors", "config.json")}


@pytest.mark.parametrize("place", ["moved", "s3"])
def test_three_students_by_one_recipe_are_those_of_three(
    alone: World, replay_dir: Path, tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    family(replay_dir, FAMILY, epochs=1)
    assert command(replay_dir) == 0
    together = {name: published(replay_dir, name) for name in FAMILY}
    store = replay_dir / "runs" / "tiny" / "store"
    path = str(tmp_path / "elsewhere")
    if place == "s3":
        path = f"{request.getfixturevalue('bucket')}/store"
        for file in store.rglob("*"):
            if file.is_file():
                storage.publish_bytes(f"{path}/{file.relative_to(store)}", file.read_bytes())
    store.rename(tmp_path / "elsewhere" if place == "moved" else tmp_path / "gone")
    for name in FAMILY:
        alone_recipe(replay_dir, tmp_path / name, name, path)
        assert command(tmp_path / name) == 0
        assert published(tmp_path / name, "student") == together[name]
    assert len({content["model.safetensors"] for content in together.values()}) == 3


def test_one_that_fails_is_named_and_the_others_go_on(
    alone: World, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = {"train": {"learning_rate": 1e30, "warmup_ratio": 0.0}}
    family(run_dir, {"first": {}, "hot": hot, "last": {}}, epochs=1)
    assert command(run_dir) == 3
    told = capsys.readouterr()
    assert "error: student hot: step 1: the" in told.err
    assert "error: not trained: hot; the other students are finished" in told.err
    assert "student tiny/first: trained" in told.out
    assert "student tiny/last: trained" in told.out
    assert not (student(run_dir, "hot") / "model").exists()
    assert published(run_dir, "first") == published(run_dir, "last")
    assert command(run_dir) == 3  # what is finished is left alone
    assert "student tiny/last: complete, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="step 1: the"):
        command(run_dir, "--student", "hot")


def test_all_are_checked_before_the_first_is_trained(alone: World, run_dir: Path) -> None:
    family(run_dir, {"first": {}, "second": {"train": RELATIONS}})
    with pytest.raises(UserError, match=r"student second: train.alpha_relation: .*replay_layers: 1"):
        command(run_dir)
    assert not student(run_dir, "first").exists()


def test_one_of_several_by_its_name(
    alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family(run_dir, {"first": {}, "second": {"train": {"seed": 1}}}, epochs=1)
    assert command(run_dir, "--student", "second") == 0
    assert not student(run_dir, "first").exists()
    before = published(run_dir, "second")
    assert command(run_dir) == 0
    assert "student tiny/second: complete, nothing to do" in capsys.readouterr().out
    assert published(run_dir, "second") == before
    assert published(run_dir, "first") != before
    monkeypatch.setattr(worlds, "start_world", lambda: pytest.fail("nothing is to be started"))
    assert command(run_dir) == 0


def test_other_settings_of_one_student_are_refused_for_it_alone(alone: World, run_dir: Path) -> None:
    family(run_dir, {"first": {}, "second": {}}, epochs=1)
    command(run_dir)
    with pytest.raises(UserError, match=r"students/second: .*\(train.seed: 0 -> 1\)"):
        command(run_dir, "students.second.train.seed=1")
    assert command(run_dir, "--student", "first", "students.second.train.seed=1") == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_no_term_reaches_stays_as_it_began(
    alone: World, replay_dir: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relations alone train no head, no vocabulary, and nothing above the projections of the last layer."""
    from transformers import AutoModel

    monkeypatch.setattr(triple_loss.VocabularyLoss, "forward", lambda *_: pytest.fail("a vocabulary term"))
    relations = [f"train.{name}={value:g}" for name, value in RELATIONS.items()]
    assert command(replay_dir, *relations, f"train.dtype={dtype}") == 0
    recipe = load_recipe(str(replay_dir / "recipe.yaml"), relations)
    store = open_store(recipe.store_path)
    start = build_student(
        recipe.student, recipe.train, store.teacher_config(), load_file(store.teacher_weights())
    ).model.state_dict()
    end = weights(replay_dir)
    assert set(end) == set(start)
    still = {name for name in end if torch.equal(end[name], start[name])}
    last = "transformer.layer.0"
    behind = ("attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm")
    assert still == {f"{last}.{part}.{kind}" for part in behind for kind in ("weight", "bias")}
    model_dir = student(replay_dir) / "model"
    card = (model_dir / "README.md").read_text()
    assert all(f"- `{name}`" in card for name in still)
    assert "pipeline_tag: feature-extraction" in card
    assert "Measures over the vocabulary: not trained." in card
    loaded, loading = AutoModel.from_pretrained(model_dir, output_loading_info=True)
    assert type(loaded).__name__ == "DistilBertModel"
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(validated(replay_dir)) == {"relation"}
    assert logged(replay_dir)[-1]["relation"] < logged(replay_dir)[0]["relation"]


def test_every_parameter_of_the_full_loss_is_trained(alone: World, run_dir: Path) -> None:
    assert command(run_dir, "train.epochs=1") == 0
    assert "No term of the loss reaches" not in (student(run_dir) / "model" / "README.md").read_text()


@pytest.mark.parametrize("replay_layers", [0, 1])
def test_a_store_without_all_of_the_teachers_weights(
    alone: World, tmp_path: Path, replay_layers: int
) -> None:
    """The store has the weights for replay, but a student cannot start from the teacher's layers."""
    make_run(tmp_path, teacher_weights=False, replay_layers=replay_layers)
    relations = ["train.alpha_relation=1"] * replay_layers
    with pytest.raises(UserError, match="student.init is teacher, but the store does not hold"):
        command(tmp_path, *relations)
    assert command(tmp_path, "student.init=random", *relations) == 0
    lines = logged(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert validated(tmp_path)["kl_t1"] > 0


def test_replayed_knowledge_is_stored_knowledge(alone: World, run_dir: Path, replay_dir: Path) -> None:
    """The input of the top layer gives the losses of the stored last hidden states, up to rounding."""
    for root in (run_dir, replay_dir):
        command(root, "train.epochs=1")
    for stored, replayed in zip(logged(run_dir), logged(replay_dir), strict=True):
        for name in ("loss", "kl", "mlm", "cosine"):
            assert replayed[name] == pytest.approx(stored[name], rel=2e-3), name
    assert history(replay_dir)[-1]["validation_teacher_mlm_loss"] == pytest.approx(
        history(run_dir)[-1]["validation_teacher_mlm_loss"], rel=1e-3
    )
