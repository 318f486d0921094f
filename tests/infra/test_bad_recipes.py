"""A mistake in a recipe or an override: one line that names the file and the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from infra.settings.recipe_file import load_recipe
from infra.settings.sections.task_settings import MAX_BYTES
from tests.infra.test_recipe import MINIMAL, load

BAD = [
    # what the file holds, what the one line says
    ("- a", "a recipe is a mapping of sections, this is ['a']"),
    ("", "a recipe is a mapping of sections, this is null"),
    ("just words", "a recipe is a mapping of sections"),
    ("a: [", "not a recipe in YAML"),
    ("a: b: c", "not a recipe in YAML: mapping values are not allowed here (line 1)"),
    ("\x00", "not a recipe in YAML"),
    ("name: x\nname: y", "key 'name' occurs twice (line 2)"),
    ("train: {seed: 1, seed: 2}", "key 'seed' occurs twice (line 1)"),
    ("a: &x [1]\nb: *x", "anchors and aliases are not allowed (line 1)"),
    ("a: !!python/object/apply:os.system [ls]", "tags are not allowed (line 1)"),
    ("? [a]\n: b", "a key must be a word (line 1)"),
    ("---\na: 1\n---\nb: 1", "found another document (line 3)"),
    ("a: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
    ("train: {seed: 99999999999999999999}", "a number has more than 64 bits"),
    ("corpus: {path: a}\nteacher: {model: m}", "name: is required"),
    ("{}", "name: is required, for example name: my-run"),
    ("name: x\ncorpus: {}\nteacher: {model: m}", "corpus.path: is required"),
    ("name: x\ncorpus: {path: a}\nteacher: {}", "teacher.model: is required"),
    ("name: x\nstudents: [a, b]", "students: expected a mapping of names, not ['a', 'b']"),
    ("name: x\nstudents: {a: 3}", "students.a: expected a mapping of settings, not 3"),
    ("name: x\nstudents: {a: {trian: {}}}", "students.a: unknown key trian; did you mean train?"),
    ("name: x\nstudents: {a: {store: {}}}", "students.a: unknown key store"),
    ("name: x\nstudents: {a: {train: 3}}", "students.a.train: expected a mapping of settings, not 3"),
    (
        "name: x\nstudents: {a: {train: {epoch: 3}}}",
        "students.a: unknown key train.epoch; did you mean epochs?",
    ),
    ("name: x\nstudents: {a: {train: {epochs: 0}}}", "students.a: train.epochs: must be > 0, not 0"),
    ("name: x\nstudents: {a: {}, a: {}}", "key 'a' occurs twice"),
    ("name: x\nstudents: {a: {}, A: {}}", "students: two of a, A differ only in upper and lower case"),
    ("name: x\nstudents: {../a: {}}", "students: must be letters, digits"),
    ("name: x\nstudents: {Teacher: {}}", "students: teacher is the name of another row of the report"),
    (
        MINIMAL + "students: {a: {train: {alpha_relation: 1}}}",
        "students.a.train.alpha_relation: relations need",
    ),
    (
        MINIMAL + "train: {alpha_relation: 1}",
        "train.alpha_relation: relations need the input of the teacher's top layer",
    ),
    (MINIMAL + "trian: {}", "unknown key trian; did you mean train?"),
    (MINIMAL + "train: {temprature: 2}", "unknown key train.temprature; did you mean temperature?"),
    (MINIMAL + "train: {top_k: 8}", "unknown key train.top_k; did you mean store.top_k?"),
    (MINIMAL + "student: {xyzzy: 8}", "unknown key student.xyzzy; known are layers, init"),
    (MINIMAL + "train: 3", "train: expected a mapping of settings, not 3"),
    (MINIMAL + "train: {seed: '3'}", "train.seed: expected a whole number, not '3'"),
    (MINIMAL + "train: {seed: 3.0}", "train.seed: expected a whole number, not 3.0"),
    (MINIMAL + "train: {seed: true}", "train.seed: expected a whole number, not true"),
    (MINIMAL + "train: {seed: 1:30}", "train.seed: expected a whole number, not '1:30'"),
    (MINIMAL + "train: {alpha_ce: .nan}", "train.alpha_ce: expected a number, not nan"),
    (MINIMAL + "train: {alpha_ce: .inf}", "train.alpha_ce: expected a number, not inf"),
    (MINIMAL + "train: {alpha_ce: 1e999}", "train.alpha_ce: expected a number, not inf"),
    (MINIMAL + "train: {betas: [0.9]}", "train.betas: expected a list of 2 numbers, not [0.9]"),
    (MINIMAL + "train: {zero_stage: 3}", "train.zero_stage: expected one of 0, 1, 2, not 3"),
    (MINIMAL + "train: {zero_stage: true}", "train.zero_stage: expected one of 0, 1, 2, not true"),
    (MINIMAL + "train: {compile: yes}", "train.compile: expected true or false, not 'yes'"),
    (MINIMAL + "train: {max_steps: soon}", "train.max_steps: expected a whole number or null, not 'soon'"),
    (MINIMAL + "masking: {sampling: some}", "expected one of uniform, frequency, not 'some'"),
    (MINIMAL + "masking: {probability: 0.9}", "masking.probability: must be 0 to 0.5, not 0.9"),
    (MINIMAL + "student: {layers: 3}", "student.layers: expected text or a list of whole numbers, not 3"),
    (MINIMAL + "evaluation: {seeds: [0, a]}", "evaluation.seeds: expected a list of whole numbers, not [0"),
    (MINIMAL + "train: {batch_size: 33}", "train.batch_size: 33 is not a multiple of micro_batch_size = 32"),
    (
        MINIMAL + "masking: {probability: 0, epochs: 2}",
        "masking.epochs: 2 passes over text that is not masked",
    ),
    (MINIMAL + "masking: {replicas: 2}", "unknown key masking.replicas"),
    (
        MINIMAL.replace("model: m", "model: m, gpus_per_worker: 1.5"),
        "gpus_per_worker: must be 0 to 1, not 1.5",
    ),
    (MINIMAL.replace("model: m", "model: m, tasks_in_flight: 0"), "tasks_in_flight: must be >= 1, not 0"),
    (MINIMAL.replace("a.txt", '"a\\ud800.txt"'), 'corpus.path: ["a\\ud800.txt"] is not valid Unicode'),
    ("name: ../x\ncorpus: {path: a}\nteacher: {model: m}", "name: must be letters, digits"),
    (MINIMAL + "output: ''", "output: is empty; name a directory"),
    (MINIMAL + "tracking: {uri: 'http://me:secret@host'}", "tracking.uri: holds a password"),
    (MINIMAL + "tracking: {uri: 'https://TOKEN@host/'}", "tracking.uri: holds a user name or token"),
    (
        MINIMAL + "tracking: {uri: 'https://host/?token=S'}",
        "tracking.uri: holds a token or signature in its parameter token",
    ),
    (
        MINIMAL + "output: 'abfs://c@a.dfs.core.windows.net/x?sv=1&sig=S'",
        "output: holds a token or signature in its parameter sig",
    ),
    (
        MINIMAL + "evaluation: {data: 's3://b/x?X-Amz-Signature=S'}",
        "holds a token or signature in its parameter X-Amz-Signature",
    ),
    (
        MINIMAL + "store: {path: 'https://host/s?AccessKeyId='}",
        "holds a token or signature in its parameter AccessKeyId",
    ),
    (MINIMAL + "store: {hidden_states: none}", "train.alpha_cos: the cosine term needs hidden states"),
    (
        MINIMAL + "store: {hidden_states: none}\ntrain: {alpha_cos: 0, soft_targets: exact}",
        "train.soft_targets: exact needs hidden states",
    ),
    (
        MINIMAL + "store: {top_k: 0}\ntrain: {soft_targets: topk}",
        "train.soft_targets: topk needs top-k logits",
    ),
    (
        MINIMAL + "train: {soft_targets: topk, temperature: 3}",
        "train.temperature: 3 is not among the store's temperatures [1.0, 2.0]",
    ),
    (
        MINIMAL + "store: {hidden_states: none}\ntrain: {alpha_cos: 0, temperature: 4}",
        "train.temperature: 4 is not among the store's temperatures",
    ),
    (
        MINIMAL + "store: {positions: masked}",
        "train.kl_positions: all, but the store holds masked positions only",
    ),
    (
        MINIMAL + "store: {positions: pooled, top_k: 0}",
        "store.positions: pooled keeps one vector per document",
    ),
    (
        MINIMAL + "store: {positions: masked, replay_layers: 1}",
        "store.replay_layers: the top layers can only be",
    ),
    (
        MINIMAL + "store: {top_k: 0, hidden_states: none}",
        "would leave the store without outputs of the teacher",
    ),
    (
        MINIMAL + "store: {block_bytes: 9, shard_bytes: 8}",
        "store.shard_bytes: 8 is less than block_bytes = 9",
    ),
    (MINIMAL.replace("a.txt", "a.txt, config: c"), "are for source: hub, not text"),
    (
        MINIMAL.replace("a.txt", "a.txt, source: hub, validation_path: b"),
        "corpus.validation_path: is not for a hub corpus",
    ),
    (MINIMAL.replace("a.txt", "a.txt, source: jsonl, document: file"), "corpus.document: file is for"),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_bad_recipes_are_one_line_naming_the_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    sentence = str(caught.value)
    assert sentence.startswith(f"{tmp_path}/r.yaml: ")
    assert words in sentence
    assert "\n" not in sentence
    assert "secret" not in sentence


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.seed", "write section.key=value"),
        ("=1", "write section.key=value"),
        ("train=1", "write section.key=value"),
        ("train.sed=1", "override train.sed: unknown key; did you mean seed?"),
        ("trian.seed=1", "override trian.seed: unknown section trian; did you mean train?"),
        ("seed=1", "did you mean masking.seed or train.seed?"),
        ("train.seed=many", "train.seed: expected a whole number, not 'many'"),
        ("train.seed=", "train.seed: expected a whole number, not null"),
        ("name=a/b", "name: must be letters"),
        ("students.a.train.seed=1", "override students.a.train.seed: unknown student a; known are"),
    ],
)
def test_bad_overrides_are_one_line(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, MINIMAL, override)
    assert words in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml: no such file"):
        load_recipe(str(tmp_path / "missing.yaml"))
    with pytest.raises(UserError, match="is a directory"):
        load_recipe(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: not a recipe in YAML"):
        load_recipe(str(tmp_path / "binary.yaml"))
    (tmp_path / "large.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match="a recipe is at most 65536 bytes"):
        load_recipe(str(tmp_path / "large.yaml"))


@given(
    data=st.binary(max_size=300) | st.text(alphabet="ab:[]{}&*!?|>-#'\"\n 1.", max_size=60).map(str.encode)
)
def test_any_bytes_give_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError):  # nothing that short is a recipe
        load_recipe(str(path))
