"""Recipes: what is accepted, and what comes back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from infra.settings import sections
from infra.settings.recipe import Recipe, fingerprinted_settings
from infra.settings.recipe_file import load_recipe
from infra.settings.sections.task_settings import read_file

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = "name: x\ncorpus: {path: a.txt}\nteacher: {model: m}\n"


def load(directory: Path, text: str, *overrides: str) -> Recipe:
    path = directory / "r.yaml"
    path.write_text(text)
    return load_recipe(str(path), overrides)


def test_the_least_recipe_takes_all_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert recipe == Recipe(
        name="x", corpus=sections.Corpus(path=("a.txt",)), teacher=sections.Teacher(model="m")
    )
    assert recipe.root == "runs/x"
    assert recipe.store_path == "runs/x/store"
    assert {name: run.directory for name, run in recipe.runs().items()} == {
        "student": "runs/x/students/student"
    }
    assert recipe.evaluation_dir == "runs/x/evaluation"


@pytest.mark.parametrize("text", ["name: x", "name: x\ncorpus:\nteacher:\n"])
def test_a_recipe_of_a_store_that_is_there_needs_no_corpus_and_no_teacher(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path, text, "store.path=s3://bucket/stores/wiki")
    assert (recipe.corpus, recipe.teacher) == (None, None)
    assert recipe.store_path == "s3://bucket/stores/wiki"
    recipe.save(str(tmp_path))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


FAMILY = """
name: x
train: {epochs: 2, seed: 5}
student: {dropout: 0}
students:
  half:
  tiny: {student: {layers: [0], init: random, hidden_size: 64}, train: {alpha_ce: 0, epochs: 7}}
"""


def test_several_students_have_a_task_of_the_recipe_itself(tmp_path: Path) -> None:
    task = "{name: tickets, kind: classification, train: t.csv, text: text, label: label, metrics: accuracy}"
    recipe = load(tmp_path, f"{FAMILY}evaluation: {{tasks: [{task}]}}\n")
    (tickets,) = recipe.evaluation.tasks
    assert not isinstance(tickets, str)
    assert (tickets.text, tickets.metrics) == (("text",), ("accuracy",))
    assert list(recipe.runs()) == ["half", "tiny"]


def test_students_set_what_they_have_of_their_own(tmp_path: Path) -> None:
    recipe = load(tmp_path, FAMILY, "students.half.train.seed=6", "train.learning_rate=1e-3")
    half, tiny = recipe.runs().values()
    assert (half.name, tiny.name) == ("half", "tiny")
    assert (half.train.epochs, half.train.seed, half.train.alpha_ce) == (2, 6, 5)
    assert (tiny.train.epochs, tiny.train.seed, tiny.train.alpha_ce) == (7, 5, 0)
    assert half.train.learning_rate == tiny.train.learning_rate == 1e-3
    assert (half.student, tiny.student.layers) == (sections.Student(dropout=0.0), (0,))
    assert (tiny.student.dropout, tiny.student.hidden_size) == (0, 64)
    assert tiny.directory == "runs/x/students/tiny"
    assert (half.registered_name, tiny.registered_name) == ("x-half", "x-tiny")
    assert tiny.fingerprinted_settings()["train"]["epochs"] == 7
    recipe.save(str(tmp_path))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    with pytest.raises(UserError, match="no student 'tini'; did you mean tiny"):
        recipe.run("tini")


def test_a_student_alone_has_the_settings_it_has_in_the_family(tmp_path: Path) -> None:
    tiny = load(tmp_path, FAMILY).run("tiny")
    train = "train: {epochs: 7, seed: 5, alpha_ce: 0}"
    student = "student: {dropout: 0, layers: [0], init: random, hidden_size: 64}"
    only = load(tmp_path, f"name: other\n{train}\n{student}").run("student")
    assert only.fingerprinted_settings() == tiny.fingerprinted_settings()
    assert (only.name, only.registered_name) == ("student", "other")


def test_values_and_overrides_arrive(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        MINIMAL + "train: {learning_rate: 1e-4, betas: [0.8, 0.9], alpha_ce: 3}\nstore:\n",
        "train.seed=7",
        "corpus.path=*.txt",
        "corpus.validation_path=[a, b]",
        "student.layers=[0, 2]",
        "train.max_steps=null",
        "teacher.revision=1234567",
        "name=2024",
        "output=/somewhere",
        "tracking.uri=http://127.0.0.1:5000",
    )
    assert (recipe.train.learning_rate, recipe.train.betas, recipe.train.alpha_ce) == (1e-4, (0.8, 0.9), 3.0)
    assert (recipe.train.seed, recipe.train.max_steps) == (7, None)
    assert recipe.corpus is not None
    assert recipe.teacher is not None
    assert (recipe.corpus.path, recipe.corpus.validation_path) == (("*.txt",), ("a", "b"))
    assert (recipe.student.layers, recipe.teacher.revision) == ((0, 2), "1234567")
    assert recipe.tracking.uri == "http://127.0.0.1:5000"
    assert recipe.root == "/somewhere/2024"


words = st.text(max_size=20)
paths = words.filter(lambda text: "~" not in text and "file://" not in text.lower())  # which loading expands
positive = st.integers(1, 10**6)
numbers = st.floats(0, 1e6, allow_subnormal=False)


def students() -> st.SearchStrategy[sections.Student]:
    return st.builds(sections.Student, layers=st.sampled_from(["every_second", "last:3", (0, 2, 5)]))


def training() -> st.SearchStrategy[sections.Train]:
    return st.builds(sections.Train, alpha_ce=numbers, max_steps=st.none() | positive, compile=st.booleans())


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    return Recipe(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        output=draw(paths.filter(bool)),
        corpus=sections.Corpus(
            path=tuple(draw(st.lists(paths, min_size=1, max_size=3))), text_column=draw(words)
        ),
        masking=sections.Masking(seed=draw(st.integers(0, 2**63 - 1)), smoothing=draw(numbers)),
        teacher=sections.Teacher(
            model=draw(paths),
            revision=draw(st.none() | words),
            gpus_per_worker=draw(st.floats(0, 1)),
        ),
        store=sections.Store(path=draw(st.none() | paths)),
        student=draw(students()),
        train=draw(training()),
        students=draw(
            st.dictionaries(
                st.sampled_from(["half", "tiny", "1e5"]),
                st.builds(sections.Variant, student=students(), train=training()),
            )
        ),
        tracking=sections.Tracking(experiment=draw(words), uri=draw(st.none() | paths)),
    )


@given(recipe=recipes())
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    directory = str(tmp_path_factory.getbasetemp())
    recipe.save(directory)
    assert load_recipe(f"{directory}/recipe.yaml") == recipe


@given(
    text=st.text(max_size=12) | st.sampled_from(["1e5", "0x1F", "on", "~", "2024-01-01", "1_000", "<<", "="])
)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    corpus = sections.Corpus(path=("x",), text_column=text, split=text)
    recipe = Recipe(name="x", corpus=corpus, teacher=sections.Teacher(model="x", revision=text))
    recipe.save(str(tmp_path_factory.getbasetemp()))
    assert load_recipe(str(tmp_path_factory.getbasetemp() / "recipe.yaml")) == recipe


def test_the_home_directory_is_meant_by_a_tilde_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = str(tmp_path)
    monkeypatch.setenv("HOME", home)
    (tmp_path / "r.yaml").write_text(
        "name: x\ncorpus: {path: [~/a/*.txt, s3://b/~/c]}\nteacher: {model: ~/t}\n"
    )
    overrides = [
        "output=~/x",
        "corpus.validation_path=file://~/v.txt",
        "evaluation.data=~/d",
        "train.cache_dir=~/c",
        "train.deepspeed_config=~/ds.json",
        "tracking.uri=sqlite:///~/m.db",
        "evaluation.models={a: ~/a, b: owner/name}",
    ]
    recipe = load_recipe(str(tmp_path / "r.yaml"), overrides)
    assert recipe.evaluation.models == {"a": f"{home}/a", "b": "owner/name"}
    stored = load_recipe(str(tmp_path / "r.yaml"), ["store.path=~/stores/s"])
    assert stored.store_path == f"{home}/stores/s"
    assert recipe.store_path == f"{home}/x/x/store"
    assert recipe.corpus is not None
    assert recipe.teacher is not None
    assert recipe.corpus.path == (f"{home}/a/*.txt", "s3://b/~/c")
    assert recipe.corpus.validation_path == (f"{home}/v.txt",)
    assert recipe.teacher.model == f"{home}/t"
    assert recipe.evaluation.data == f"{home}/d"
    assert (recipe.train.cache_dir, recipe.train.deepspeed_config) == (f"{home}/c", f"{home}/ds.json")
    assert recipe.tracking.uri == f"sqlite:///{home}/m.db"
    for uri, meant in {"file://~/m": f"file://{home}/m", "http://h/~me": "http://h/~me"}.items():
        assert load_recipe(str(tmp_path / "r.yaml"), [f"tracking.uri={uri}"]).tracking.uri == meant


URL = "https://user:hunter2@host/x.csv"
TASK = {"name": "own", "kind": "classification", "text": ["t"], "label": "l"}


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        (f"evaluation.tasks={json.dumps([{**TASK, 'train': URL}])}", "evaluation.tasks"),
        (f"train.phases={json.dumps([{'store': URL, 'steps': 3}])}", "train.phases"),
        (f"evaluation.models={json.dumps({'a': URL})}", "evaluation.models"),
    ],
)
def test_a_password_inside_a_list_is_refused_and_not_repeated(
    tmp_path: Path, override: str, setting: str
) -> None:
    (tmp_path / "r.yaml").write_text("name: x\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "r.yaml"), [override])
    assert setting in str(caught.value)
    assert "holds a password" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_password_in_a_task_file_is_refused_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(json.dumps({**TASK, "train": URL}))
    with pytest.raises(UserError, match=r"task\.yaml: train: holds a password") as caught:
        read_file(str(tmp_path / "task.yaml"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("seeds", "says"), [("[-1]", "seeds: must be >= 0, not -1"), ("[0, 1, 0]", "0, 1, 0 names a seed twice")]
)
def test_invalid_seeds_are_refused(tmp_path: Path, seeds: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match=says):
        load_recipe(str(tmp_path / "r.yaml"), [f"evaluation.seeds={seeds}"])


FINGERPRINTED = {
    "masking": "probability sampling smoothing whole_word epochs seed",
    "sequences": "length packing part_bytes",
    "student": "layers init hidden_size attention_heads intermediate_size dropout",
    "train": "epochs max_steps batch_size learning_rate betas eps weight_decay schedule warmup_ratio"
    " max_grad_norm temperature alpha_ce alpha_mlm alpha_cos alpha_relation alpha_embedding relation_heads"
    " relation_weights relation_layer soft_targets kl_positions teacher dtype seed window_batches",
    "store": "replay_layers hidden_states positions top_k temperatures teacher_weights task_sequences"
    " block_bytes shard_bytes",
}


@pytest.mark.parametrize("section", FINGERPRINTED)
def test_fingerprints_of_default_settings_have_these_keys(section: str) -> None:
    """One more key refuses all finished stores or students: declare new settings with `fields.added`."""
    defaults = getattr(sections, section.capitalize())()
    assert list(fingerprinted_settings(defaults)) == FINGERPRINTED[section].split()


def test_a_setting_that_a_version_added_keeps_the_fingerprints_of_earlier_ones(tmp_path: Path) -> None:
    """Otherwise every finished store would be refused after an upgrade."""
    before = load(tmp_path, MINIMAL).fingerprinted_settings("masking")["masking"]
    assert "replacement" not in before
    assert "whole_word" in before
    changed = load(tmp_path, MINIMAL + "masking: {replacement: mask}\n").fingerprinted_settings("masking")
    assert changed["masking"] == {**before, "replacement": "mask"}


def test_the_outcome_holds_outcome_fields_only(tmp_path: Path) -> None:
    outcome = load(tmp_path, MINIMAL).fingerprinted_settings("masking", "teacher", "store")
    assert set(outcome) == {"masking", "teacher", "store"}
    assert outcome["teacher"] == {"dtype": "bfloat16", "batch_size": 32, "cpu_threads": 1}
    assert outcome["store"]["temperatures"] == [1.0, 2.0]
    assert json.loads(json.dumps(outcome)) == outcome


def test_every_field_says_whether_it_changes_the_outcome() -> None:
    for field in dataclasses.fields(Recipe):
        if field.name not in ("name", "output", "students"):
            for item in dataclasses.fields(getattr(sections, field.name.capitalize())):
                assert isinstance(item.metadata.get("fingerprinted"), bool), f"{field.name}.{item.name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "infra" / "recipes").glob("*.yaml")), ids=lambda path: path.name
)
def test_our_own_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert yaml.safe_load(recipe.to_yaml())["name"] == recipe.name
