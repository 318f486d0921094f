"""A user's mistakes about stores, families and several students, in the commands that meet them.

Each is exit code 2 and one line that says where and what to do, before Ray or training starts; nothing is
written. What is spoiled is a copy of small stores that real passes made.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForMaskedLM

from infra.console import command
from offline_teacher.main import main
from student_train.main import parse
from student_train.main import run as train
from tests.offline_teacher.local_pool import make
from tests.offline_teacher.stores import contents
from tests.offline_teacher.tiny_teacher import save_bert, save_roberta, write_recipe, write_text

Spoil = Callable[[Path], object]
Case = tuple[Spoil, list[str], list[str]]
STORES = {
    "plain": [],
    "relations": ["store.replay_layers=1"],
    "withheld": ["store.teacher_weights=false"],
    "logits": ["store.hidden_states=none", "train.alpha_cos=0"],
    "masked": ["store.positions=masked", "train.kl_positions=masked"],
    "unmasked": ["masking.probability=0", "store.top_k=0"],
}
"""Stores of one teacher and text."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, three teachers, a recipe, and finished stores in ``stores``."""
    root = tmp_path_factory.mktemp("good")
    text = write_text(root / "text.txt", 12)
    recipe = write_recipe(root, text, save_bert(root / "model"), train={"dtype": "float32"})
    save_roberta(root / "roberta")
    save_encoder(root / "encoder", root / "model")
    for name, overrides in STORES.items():
        make(recipe, f"store.path={root}/stores/{name}", *overrides)
    pooled = ["store.positions=pooled", "store.top_k=0", "sequences.packing=document"]
    make(recipe, f"store.path={root}/stores/pooled", f"teacher.model={root}/encoder", *pooled)
    return root


@pytest.fixture
def project(good: Path, tmp_path: Path) -> Path:
    """The same in a directory of its own, to be spoiled."""
    root = tmp_path / "p"
    shutil.copytree(good, root)
    for path in (root / "recipe.yaml", *root.glob("stores/*/recipe.yaml")):
        path.write_text(path.read_text().replace(str(good), str(root)))
    return root


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    monkeypatch.setattr("student_train.main._train_all", lambda *_, **__: pytest.fail("training was started"))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def save_encoder(directory: Path, model: Path) -> None:
    """A sentence encoder: the encoder of a masked LM, and how its vectors are pooled."""
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    BertForMaskedLM.from_pretrained(model).bert.save_pretrained(directory)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (directory / "modules.json").write_text(json.dumps(modules))


def nothing(root: Path) -> None: ...


def write(name: str, content: str) -> Spoil:
    return lambda root: (root / name).write_text(content)


def remove(name: str) -> Spoil:
    return lambda root: (root / name).unlink()


def flip(pattern: str) -> Spoil:
    """A bit of the first file that fits."""

    def spoil(root: Path) -> None:
        path = min(root.glob(pattern))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)

    return spoil


def unfinished(root: Path) -> None:
    (root / "stores/plain/manifest.json").unlink()
    min((root / "stores/plain/tasks/train").glob("*.json")).unlink()


def another_manifest(root: Path) -> None:
    shutil.copy(root / "stores/relations/manifest.json", root / "stores/plain/manifest.json")


def format_1(root: Path) -> None:
    (root / "old").mkdir()
    for name in ("declaration.json", "manifest.json"):
        (root / "old" / name).write_text("{}")


def huge_states(root: Path) -> None:
    path = root / "model/model.safetensors"
    weights = load_file(path)
    weights["bert.encoder.layer.1.output.LayerNorm.bias"] += 1e6
    save_file(weights, path, {"format": "pt"})


def in_recipe(**sections: object) -> Spoil:
    """Sections of the recipe replaced; None: left out."""

    def spoil(root: Path) -> None:
        values = {**yaml.safe_load((root / "recipe.yaml").read_text()), **sections}
        kept = {name: value for name, value in values.items() if value is not None}
        (root / "recipe.yaml").write_text(yaml.safe_dump(kept))

    return spoil


def add_line(line: str) -> Spoil:
    return lambda root: (root / "recipe.yaml").write_text((root / "recipe.yaml").read_text() + line)


def students(**named: object) -> Spoil:
    return in_recipe(students=named)


def settings(*overrides: str) -> list[str]:
    return ["run", "--recipe", "{root}/recipe.yaml", *overrides]


def of_store(name: str, *overrides: str) -> list[str]:
    """Training from a finished store, without corpus and teacher."""
    return ["train", "--recipe", "{root}/recipe.yaml", f"store.path={{root}}/stores/{name}", *overrides]


RELATIONS = ["train.alpha_ce=0", "train.alpha_mlm=0", "train.alpha_cos=0", "train.alpha_relation=1"]
POOLED = ["store.positions=pooled", "store.top_k=0", "sequences.packing=document"]
PASS: dict[str, Case] = {
    # where the store is
    "a file for a store": (nothing, settings("store.path={root}/text.txt"), ["{root}/text.txt"]),
    "a store around the recipe's own directory": (
        nothing,
        settings("store.path={root}/runs/tiny"),
        ["store.path: {root}/runs/tiny would hold {root}/runs/tiny", "a directory of its own"],
    ),
    "a store around all outputs": (nothing, settings("store.path={root}"), ["store.path: {root} would hold"]),
    "a store of format 1": (
        format_1,
        settings("store.path={root}/old"),
        ["{root}/old", "format 1", "make it again"],
    ),
    "a store made differently": (
        nothing,
        settings("store.path={root}/stores/plain", "masking.seed=7"),
        ["{root}/stores/plain", "masking.seed: 0 -> 7", "choose another store.path"],
    ),
    "a store of another teacher": (
        nothing,
        settings("store.path={root}/stores/plain", "teacher.model={root}/roberta"),
        ["{root}/stores/plain", "teacher: ", "choose another store.path"],
    ),
    "a store that cannot be written": (nothing, settings("store.path=/proc/store"), ["/proc/store"]),
    "a password in the store's URL": (
        nothing,
        settings("store.path=s3://me:hunter2@b/store"),
        ["store.path", "environment"],
    ),
    "no corpus": (in_recipe(corpus=None), settings(), ["corpus: is required to make a store"]),
    "no teacher": (in_recipe(teacher=None), settings(), ["teacher: is required to make a store"]),
    "plan without corpus": (
        in_recipe(corpus=None),
        ["plan", "--recipe", "{root}/recipe.yaml"],
        ["corpus: is required to plan a store"],
    ),
    # what it is to hold
    "more replayed layers than there are": (
        nothing,
        settings("store.replay_layers=5"),
        ["store.replay_layers: 5", "the teacher's 2 layers"],
    ),
    "fewer replayed layers than none": (nothing, settings("store.replay_layers=-1"), ["store.replay_layers"]),
    "replay of masked positions": (
        nothing,
        settings("store.replay_layers=1", "store.positions=masked", "train.kl_positions=masked"),
        ["store.replay_layers", "set positions: all"],
    ),
    "replay of nothing": (
        nothing,
        settings("store.replay_layers=1", "store.hidden_states=none", "train.alpha_cos=0"),
        ["store.replay_layers", "hidden_states: float16"],
    ),
    "masked positions of unmasked text": (
        nothing,
        settings("store.positions=masked", "masking.probability=0", "train.kl_positions=masked"),
        ["store.positions", "masking.probability"],
    ),
    "epochs that are all the same": (
        nothing,
        settings("masking.probability=0", "masking.epochs=2"),
        ["masking.epochs: 2", "set epochs: 1"],
    ),
    "an unknown form": (nothing, settings("store.hidden_states=float8"), ["store.hidden_states", "int8"]),
    "logsumexp without T = 1": (nothing, settings("store.temperatures=[2]"), ["store.temperatures", "1.0"]),
    "more top-k than can be": (nothing, settings("store.top_k=2000"), ["store.top_k", "0 to 1024"]),
    "shards below a block": (
        nothing,
        settings("store.shard_bytes=10", "store.block_bytes=20"),
        ["store.shard_bytes: 10", "block_bytes = 20"],
    ),
    "tasks of nothing": (nothing, settings("store.task_sequences=0"), ["store.task_sequences"]),
    "two GPUs a worker": (
        nothing,
        settings("teacher.gpus_per_worker=2"),
        ["teacher.gpus_per_worker", "start more workers"],
    ),
    "states beyond float16": (
        huge_states,
        settings("teacher.dtype=float32"),
        ["store.hidden_states: float16 cannot hold", "bfloat16, or int8"],
    ),
    # families
    "an unknown family": (
        lambda root: (root / "model/config.json").write_text('{"model_type": "t5"}'),
        settings(),
        ["{root}/model/config.json", "'t5' is not a supported family", "bert", "modernbert"],
    ),
    "longer than the family's positions": (
        nothing,
        settings("teacher.model={root}/roberta", "sequences.length=65"),
        ["sequences.length: 65", "64 positions of {root}/roberta"],
    ),
    "logits of an encoder": (
        nothing,
        settings("teacher.model={root}/encoder"),
        ["store.top_k", "{root}/encoder has no masked-LM head", "set store.top_k: 0"],
    ),
    "pooled vectors of a masked LM": (
        nothing,
        settings(*POOLED),
        ["store.positions: pooled", "has no modules.json", "set it to all"],
    ),
    "pooled vectors and logits": (
        nothing,
        settings("store.positions=pooled", "sequences.packing=document"),
        ["store.positions: pooled", "top_k: 0"],
    ),
    "pooled vectors in int8": (
        nothing,
        settings(*POOLED, "teacher.model={root}/encoder", "store.hidden_states=int8"),
        ["store.hidden_states", "kept in float16"],
    ),
    "pooled vectors of packed text": (
        nothing,
        settings("store.positions=pooled", "store.top_k=0"),
        ["store.positions: pooled", "packing: document"],
    ),
    "pooled vectors of masked text": (
        nothing,
        settings(*POOLED, "teacher.model={root}/encoder", "masking.probability=0.15"),
        ["masking.probability", "set it to 0"],
    ),
    "longer than the encoder's users cut": (
        nothing,
        settings(*POOLED, "teacher.model={root}/encoder", "sequences.length=40"),
        ["sequences.length: 40", "32 tokens"],
    ),
    "a pooling that is not supported": (
        write("encoder/1_Pooling/config.json", '{"pooling_mode_max_tokens": true}'),
        settings(*POOLED, "teacher.model={root}/encoder"),
        ["{root}/encoder", "max"],
    ),
    # several students
    "two students of one name": (
        add_line("students:\n  half: {}\n  half: {}\n"),
        settings(),
        ["recipe.yaml", "half"],
    ),
    "two students that differ in case": (students(Half={}, half={}), settings(), ["students", "Half, half"]),
    "a student's name is no path": (students(**{"a/b": {}}), settings(), ["students", "'a/b'"]),
    "a student with a store": (
        students(half={"store": {}}),
        settings(),
        ["students.half: unknown key store"],
    ),
    "a student's unknown setting": (
        students(half={"train": {"lerning_rate": 1}}),
        settings(),
        ["students.half", "lerning_rate", "did you mean learning_rate?"],
    ),
    "students that are a list": (in_recipe(students=["half"]), settings(), ["students", "mapping of names"]),
    "relations without replay": (
        students(half={}, small={"train": {"alpha_relation": 1}}),
        settings(),
        ["students.small.train.alpha_relation", "store.replay_layers: 1"],
    ),
    "logits that no store will hold": (
        students(half={"train": {"soft_targets": "topk"}}),
        settings("store.top_k=0"),
        ["students.half.train.soft_targets: topk", "store.top_k > 0"],
    ),
    "a student that no teacher has": (
        students(half={}, deep={"student": {"layers": [0, 4]}}),
        settings(),
        ["student.layers: there is no layer 4", "0 to 1"],
    ),
}
FINISHED: dict[str, Case] = {
    # a damaged or unfinished store
    "a damaged index": (
        flip("stores/plain/tasks/train/*.json"),
        ["inspect", "{root}/stores/plain"],
        ["{root}/stores/plain is damaged: tasks/train/", "verify {root}/stores/plain --repair"],
    ),
    "a damaged shard": (
        flip("stores/plain/shards/train/*/*.arrow"),
        ["inspect", "{root}/stores/plain"],
        ["shards/train/", "block", "verify {root}/stores/plain --repair"],
    ),
    "a damaged spec": (
        flip("stores/plain/spec.json"),
        ["inspect", "{root}/stores/plain"],
        ["spec.json", "verify {root}/stores/plain --repair"],
    ),
    "no spec": (remove("stores/plain/spec.json"), of_store("plain"), ["spec.json is missing", "--repair"]),
    "another store's manifest": (another_manifest, of_store("plain"), ["spec.json has another digest"]),
    "damaged weights": (
        flip("stores/plain/teacher/model.safetensors"),
        ["inspect", "{root}/stores/plain"],
        ["teacher/model.safetensors has another digest", "--repair"],
    ),
    "a damaged tokenizer": (
        flip("stores/plain/tokenizer/tokenizer.json"),
        ["inspect", "{root}/stores/plain"],
        ["tokenizer/tokenizer.json", "--repair"],
    ),
    "inspect of format 1": (format_1, ["inspect", "{root}/old"], ["format 1", "make it again"]),
    "verify of format 1": (format_1, ["verify", "{root}/old"], ["format 1", "make it again"]),
    "training from format 1": (
        format_1,
        ["train", "--recipe", "{root}/recipe.yaml", "store.path={root}/old"],
        ["format 1", "make it again"],
    ),
    "an unfinished store": (
        unfinished,
        of_store("plain"),
        ["incomplete, 1 of", "run the teacher pass again"],
    ),
    "no store": (nothing, of_store("none"), ["{root}/stores/none is not a store", "spec.json"]),
    "a model for a store": (nothing, ["inspect", "{root}/model"], ["{root}/model is not a store"]),
    "a split that is not there": (
        nothing,
        ["inspect", "{root}/stores/plain", "--split", "validation"],
        ["--split validation", "has train"],
    ),
    "a plot of no vocabulary": (
        nothing,
        ["inspect", "{root}/stores/pooled", "--plot", "{root}/x.png"],
        ["--plot", "nothing over the vocabulary"],
    ),
    "no positions": (
        nothing,
        ["verify", "{root}/stores/plain", "--deep", "--deep-positions", "0"],
        ["--deep-positions", "at least 1"],
    ),
    "no process": (nothing, ["verify", "{root}/stores/plain", "--workers", "0"], ["--workers", "at least 1"]),
    "a rerun by another teacher": (
        nothing,
        [
            "verify",
            "{root}/stores/plain",
            "--rerun",
            "1",
            "--workers",
            "1",
            "--recipe",
            "{root}/recipe.yaml",
            "teacher.model={root}/roberta",
        ],
        ["teacher: ", "give the recipe that the store was made of (--recipe)"],
    ),
    "a rerun without a recipe": (
        remove("stores/plain/recipe.yaml"),
        ["verify", "{root}/stores/plain", "--rerun", "1", "--workers", "1"],
        ["recipe.yaml is missing", "--recipe FILE"],
    ),
    # students of a finished store
    "students inside the store": (
        nothing,
        of_store("plain", "output={root}/stores/plain"),
        ["store.path: {root}/stores/plain would hold {root}/stores/plain/tiny"],
    ),
    "no such student": (
        students(half={}, tiny={}),
        [*of_store("plain"), "--student", "tin"],
        ["no student 'tin'", "did you mean tiny?"],
    ),
    "relations of a store without replay": (
        in_recipe(corpus=None),
        of_store("plain", *RELATIONS),
        ["train.alpha_relation", "store.replay_layers: 1"],
    ),
    "heads that do not divide": (
        in_recipe(corpus=None),
        of_store("relations", *RELATIONS, "train.relation_heads=5"),
        ["train.relation_heads: 5", "divisor of 32"],
    ),
    "a layer that the student lacks": (
        in_recipe(corpus=None),
        of_store("relations", *RELATIONS, "train.relation_layer=3"),
        ["train.relation_layer", "3"],
    ),
    "weights withheld": (
        in_recipe(corpus=None),
        of_store("withheld"),
        ["student.init", "store.teacher_weights: false", "set student.init: random"],
    ),
    "a cosine without hidden states": (
        in_recipe(corpus=None),
        of_store("logits", "train.temperature=1.0"),
        ["train.alpha_cos", "set train.alpha_cos: 0"],
    ),
    "a temperature that is not there": (
        in_recipe(corpus=None),
        of_store("logits", "train.alpha_cos=0", "train.temperature=3.0"),
        ["train.temperature: 3", "[1.0, 2.0]"],
    ),
    "all positions of masked ones": (
        in_recipe(corpus=None),
        of_store("masked"),
        ["train.kl_positions: all", "set it to masked"],
    ),
    "logits that the store lacks": (
        in_recipe(corpus=None),
        of_store("unmasked", "train.alpha_mlm=0", "train.soft_targets=topk"),
        ["train.soft_targets: topk", "store.top_k: 64"],
    ),
    "labels of unmasked text": (
        in_recipe(corpus=None),
        of_store("unmasked"),
        ["train.alpha_mlm", "set train.alpha_mlm: 0"],
    ),
    "tokens of pooled vectors": (
        in_recipe(corpus=None),
        of_store("pooled"),
        ["one pooled vector a text", "store.positions: all"],
    ),
    "deeper than the teacher": (
        in_recipe(corpus=None),
        of_store("plain", "student.layers=last:5"),
        ["student.layers: last:5", "2 layers"],
    ),
    "a width that its heads do not divide": (
        in_recipe(corpus=None),
        of_store("plain", "student.hidden_size=18", "student.init=random"),
        ["student.hidden_size: 18", "4 attention heads"],
    ),
    "one bad student of two": (
        in_recipe(corpus=None, students={"half": {}, "deep": {"student": {"layers": [0, 7]}}}),
        of_store("plain"),
        ["student deep: ", "there is no layer 7"],
    ),
}
BAD = {**PASS, **FINISHED}


def test_there_are_enough_of_them() -> None:
    assert len(BAD) == len(PASS) + len(FINISHED) >= 40


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    project: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, words, named = BAD[name]
    spoil(project)
    arguments = [word.format(root=project) for word in words]
    before = contents(project)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(lambda: train(parse(arguments[1:])) if arguments[0] == "train" else main(arguments))
    printed = capfd.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2, printed
    assert len(errors) == 1, printed.err
    assert "Traceback" not in printed.out + printed.err
    assert "hunter2" not in errors[0]
    for part in named:
        assert part.format(root=project) in errors[0]
    assert contents(project) == before
