"""A user's mistakes in every command of the teacher stage: exit code 2, one line on stderr, nothing made.

Whatever can be known before Ray is started is said before it is started; what only the workers see (text
that is no text, ...) is in test_corpus.py.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from infra.console import command
from infra.errors import UserError
from offline_teacher.main import main
from tests.offline_teacher.stores import contents
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text
from tests.store.synthetic import make_store

Spoil = Callable[[Path], object]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good recipe, text and teacher, and in ``store`` a finished store of another teacher."""
    root = tmp_path_factory.mktemp("good")
    write_recipe(root, write_text(root / "text.txt", 20), save_bert(root / "model"))
    make_store(str(root / "store"))
    return root


@pytest.fixture
def project(good: Path, tmp_path: Path) -> Path:
    """The same in a directory of its own, to be spoiled."""
    root = tmp_path / "p"
    shutil.copytree(good, root)
    recipe = root / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(good), str(root)))
    return root


def nothing(root: Path) -> None: ...


def write(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda root: (root / name).write_bytes(data)


def remove(name: str) -> Spoil:
    return lambda root: (root / name).unlink()


def cut(name: str) -> Spoil:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-100])


def edit(name: str, **changes: object) -> Spoil:
    """Keys of a JSON file."""
    return lambda root: (root / name).write_text(json.dumps(json.loads((root / name).read_text()) | changes))


def pickled_weights(root: Path) -> None:
    (root / "model/model.safetensors").rename(root / "model/pytorch_model.bin")


def index_of(**weight_map: str) -> Spoil:
    """An index of split weights in place of the weights."""

    def split(root: Path) -> None:
        (root / "model/model.safetensors").unlink()
        (root / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return split


def broken_index(root: Path) -> None:
    index_of()(root)
    (root / "model/model.safetensors.index.json").write_text("{")


def no_tokenizer(root: Path) -> None:
    for path in (root / "model").glob("tokenizer*"):
        path.unlink()


def other_model(**changes: int) -> Spoil:
    return lambda root: save_bert(root / "model", **changes)


def broken_weights(root: Path) -> None:
    """One weight of the encoder is NaN, as where its training diverged."""
    path = root / "model/model.safetensors"
    weights = load_file(path)
    weights["bert.encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(weights, path, {"format": "pt"})


def without_head(root: Path) -> None:
    path = root / "model/model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if name.startswith("bert.")}
    save_file(weights, path, {"format": "pt"})
    edit("model/config.json", architectures=["BertModel"])(root)


def recipe_in_store(root: Path) -> None:
    shutil.copy(root / "recipe.yaml", root / "store")


def plot(path: str) -> tuple[Spoil, list[str], list[str]]:
    return nothing, ["inspect", "{root}/store", "--plot", path], ["--plot", path]


RUN = ["run", "--recipe", "{root}/recipe.yaml"]
# what is spoiled, the command (overrides alone: of ``run``), words of the one line
BAD: dict[str, tuple[Spoil, list[str], list[str]]] = {
    # the recipe
    "no recipe": (remove("recipe.yaml"), [], ["recipe.yaml"]),
    "recipe is a directory": (nothing, ["run", "--recipe", "{root}"], ["{root}"]),
    "recipe is not text": (write("recipe.yaml", b"\xff\xfe\x00"), [], ["recipe.yaml", "not a recipe"]),
    "recipe is not YAML": (write("recipe.yaml", "name: [tiny"), [], ["recipe.yaml", "not a recipe", "line"]),
    "recipe is a list": (write("recipe.yaml", "- tiny"), [], ["recipe.yaml", "mapping"]),
    "recipe with a tag": (write("recipe.yaml", "name: !!python/name:os.system x"), [], ["recipe.yaml"]),
    "recipe without end": (write("recipe.yaml", "#" * 70_000), [], ["recipe.yaml", "65536 bytes"]),
    "unknown key": (nothing, ["masking.sed=1"], ["masking.sed", "did you mean seed?"]),
    "unknown section": (nothing, ["maskng.seed=1"], ["maskng", "did you mean masking?"]),
    "not an override": (nothing, ["masking.seed"], ["masking.seed", "section.key=value"]),
    "wrong type": (nothing, ["teacher.batch_size=many"], ["teacher.batch_size", "whole number", "many"]),
    "no such dtype": (nothing, ["teacher.dtype=bf16"], ["teacher.dtype", "bfloat16"]),
    "sequences too long": (nothing, ["sequences.length=1025"], ["sequences.length", "8 to 1024"]),
    "masking everything": (nothing, ["masking.probability=1.5"], ["masking.probability"]),
    "no masking epoch": (nothing, ["masking.epochs=0"], ["masking.epochs", "1 to 1000"]),
    "temperature of zero": (nothing, ["store.temperatures=[0]"], ["store.temperatures", "0.1 to 1000"]),
    "temperature near zero": (nothing, ["train.temperature=0.01"], ["train.temperature", "0.1 to 1000"]),
    "temperature near infinity": (
        nothing,
        ["store.temperatures=[1, 1e30]"],
        ["store.temperatures", "0.1 to 1000"],
    ),
    "nothing to store": (
        nothing,
        ["store.top_k=0", "store.hidden_states=none"],
        ["store.top_k: 0", "without outputs of the teacher"],
    ),
    "more workers at least than at most": (
        nothing,
        ["teacher.min_workers=3"],
        ["teacher.min_workers", "workers = 1, not 3"],
    ),
    "a password in the recipe": (nothing, ["corpus.path=s3://me:hunter2@b/x.txt"], ["corpus.path"]),
    "a cosine term without hidden states": (nothing, ["store.hidden_states=none"], ["train.alpha_cos"]),
    "held-out split of a text": (nothing, ["corpus.validation_split=test"], ["corpus.validation_split"]),
    # the corpus
    "no such files": (nothing, ["corpus.path={root}/none/*.txt"], ["{root}/none/*.txt"]),
    "no such file": (nothing, ["corpus.path={root}/none.txt"], ["{root}/none.txt"]),
    "no path": (nothing, ["corpus.path=[]"], ["corpus.path"]),
    "a directory for a text": (nothing, ["corpus.path={root}/model"], ["{root}/model"]),
    "held-out text that is also training text": (
        nothing,
        ["corpus.validation_path={root}/../*/te?t.txt"],
        ["corpus.validation_path", "text.txt is also training text"],
    ),
    "no held-out files": (nothing, ["corpus.validation_path={root}/held/*"], ["{root}/held/*"]),
    "not Parquet": (nothing, ["corpus.source=parquet", "corpus.document=line"], ["text.txt", "Parquet"]),
    "no such data set": (nothing, ["corpus.source=hub", "corpus.path={root}/none"], ["{root}/none"]),
    # the teacher
    "masked positions of a teacher without a head": (
        without_head,
        ["store.positions=masked", "store.top_k=0", "train.kl_positions=masked"],
        ["store.positions: masked needs masked tokens", "no masked-LM head", "store.positions: all"],
    ),
    "no teacher": (nothing, ["teacher.model={root}/none"], ["teacher.model", "{root}/none"]),
    "a file for a teacher": (nothing, ["teacher.model={root}/text.txt"], ["teacher.model", "text.txt"]),
    "no configuration": (remove("model/config.json"), [], ["teacher.model", "config.json"]),
    "configuration is not JSON": (write("model/config.json", "{"), [], ["teacher.model", "config.json"]),
    "another family": (edit("model/config.json", model_type="gpt2"), [], ["'gpt2'", "bert, roberta"]),
    "no weights": (remove("model/model.safetensors"), [], ["teacher.model", "model.safetensors"]),
    "pickled weights": (pickled_weights, [], ["teacher.model", "other formats are not read"]),
    "weights cut off": (cut("model/model.safetensors"), [], ["model.safetensors", "whole"]),
    "index is not JSON": (broken_index, [], ["model.safetensors.index.json", "is not an index of weights"]),
    "index of absent weights": (index_of(a="part.safetensors"), [], ["part.safetensors"]),
    "index out of the directory": (
        index_of(a="../../x.safetensors"),
        [],
        ["../../x.safetensors", "in the same directory"],
    ),
    "index of nothing": (index_of(), [], ["model.safetensors.index.json", "no weights"]),
    "no tokenizer": (no_tokenizer, [], ["teacher.model", "tokenizer"]),
    "tokenizer damaged": (cut("model/tokenizer.json"), [], ["teacher.model", "tokenizer"]),
    "tokenizer without mask": (
        edit("model/tokenizer_config.json", mask_token=None),
        [],
        ["masking.probability", "{root}/model has no mask token", "set masking.probability: 0"],
    ),
    "another vocabulary": (other_model(vocab_size=60), [], ["teacher.model", "60", "vocabulary"]),
    "another padding": (edit("model/config.json", pad_token_id=3), [], ["teacher.model", "id 0", "3"]),
    "longer than the positions": (nothing, ["sequences.length=65"], ["sequences.length: 65", "64"]),
    "more top-k than tokens": (nothing, ["store.top_k=500"], ["store.top_k: 500", "93 tokens"]),
    # the output, and what is there already
    "output below a file": (write("occupied", ""), ["output={root}/occupied/runs"], ["occupied"]),
    "output that cannot be written": (nothing, ["output=/proc/runs"], ["/proc/runs"]),
    # the other commands
    "plan without recipe": (nothing, ["plan", "--recipe", "{root}/none.yaml"], ["none.yaml"]),
    "plan without teacher": (remove("model/config.json"), ["plan", *RUN[1:]], ["config.json"]),
    "plan of what cannot be masked": (
        write("text.txt", "words of another language\n"),
        ["plan", *RUN[1:]],
        ["corpus.path", "no token", "masked"],
    ),
    "verify of nothing": (nothing, ["verify", "{root}/none"], ["{root}/none", "not a store"]),
    "verify of a file": (nothing, ["verify", "{root}/text.txt"], ["text.txt", "not a store"]),
    "rerun without recipe": (
        nothing,
        ["verify", "{root}/store", "--rerun", "1", "--recipe", "{root}/none.yaml"],
        ["none.yaml"],
    ),
    "rerun of fewer than none": (nothing, ["verify", "{root}/store", "--rerun", "-1"], ["--rerun", "-1"]),
    "an override behind an option": (
        nothing,
        ["verify", "{root}/store", "--rerun", "1", "--recipe", "{root}/recipe.yaml", "masking.sed=4"],
        ["masking.sed", "did you mean seed?"],
    ),
    "overrides before and behind an option": (
        nothing,
        ["plan", "masking.seed=4", *RUN[1:], "masking.sed=4"],
        ["masking.sed", "did you mean seed?"],
    ),
    "an override that nothing needs": (recipe_in_store, ["verify", "{root}/store", "foo=1"], ["foo"]),
    "no such option": (nothing, ["verify", "{root}/store", "--deeper"], ["--deeper", "verify --help"]),
    "run without recipe": (nothing, ["run"], ["--recipe", "run --help"]),
    "inspect of nothing": (nothing, ["inspect", "{root}/none"], ["{root}/none"]),
    "inspect beyond the end": (nothing, ["inspect", "{root}/store", "--sample", "9999"], ["--sample 9999"]),
    "inspect before the start": (nothing, ["inspect", "{root}/store", "--sample", "-1"], ["--sample -1"]),
    "no such masking epoch": (nothing, ["inspect", "{root}/store", "--epoch", "9"], ["--epoch 9"]),
    "a tokenizer that cannot be loaded": (nothing, ["inspect", "{root}/store"], ["{root}/store/tokenizer"]),
    "a picture in no directory": (plot("{root}/none/x.png")),
    "a picture of no kind": (plot("{root}/x.foo")),
    "a picture over a directory": (plot("{root}")),
    "a picture without a name": (plot("")),
    "inspect of a damaged store": (cut("store/manifest.json"), ["inspect", "{root}/store"], ["manifest"]),
}


FOREIGN = "ภาษาไทยเป็นภาษาที่สวยงามและมีประวัติศาสตร์ยาวนาน\n" * 40
REFUSED: dict[str, tuple[Spoil, list[str], str]] = {
    "another language": (
        write("text.txt", FOREIGN),
        [],
        "corpus.path: no token of the sample can be",
    ),
    "no document": (write("text.txt", " \n\n"), [], "no usable document in 1 places of the corpus: 2 x"),
    "strict": (write("text.txt", "ba do\n\n"), ["corpus.strict=true"], "text.txt, line 2: empty document"),
    "layers": (
        nothing,
        ["student.layers=[0, 2]"],
        "student.layers: there is no layer 2; the teacher has 0 to 1",
    ),
    "heads": (
        nothing,
        ["student.attention_heads=1"],
        "student.attention_heads: 1 heads of 32 dimensions cannot be cut out of",
    ),
    "NaN": (broken_weights, ["teacher.dtype=float32"], "hidden states of {root}/model in float32 are not"),
    "Arrow": (write("text.txt", b"ARROW1\0\0"), [], "text.txt: is an Arrow file; set corpus.source: hub"),
}
"""Of the text, the teacher and the recipe: what is spoiled, overrides, words of the line."""


@pytest.mark.parametrize("name", REFUSED)
def test_run_refuses_what_plan_refuses_with_the_same_line(
    project: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, overrides, says = REFUSED[name]
    spoil(project)
    before, lines = contents(project), []
    for words in (["plan", *RUN[1:]], RUN):
        arguments = [word.format(root=project) for word in words] + overrides
        with pytest.raises(SystemExit) as ended:
            command(lambda arguments=arguments: main(arguments))  # type: ignore[misc]
        assert ended.value.code == 2
        lines.append(capfd.readouterr().err)
    assert lines[0] == lines[1]
    assert says.format(root=project) in lines[0]
    assert contents(project) == before


def test_held_out_text_of_another_language_is_refused(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "held.txt").write_text(FOREIGN)
    arguments = ["run", "--recipe", f"{project}/recipe.yaml", f"corpus.validation_path={project}/held.txt"]
    with pytest.raises(UserError, match=r"^corpus\.validation_path: no token of the sample can be masked"):
        main(arguments)
    assert not (project / "runs").exists()


@pytest.mark.parametrize("command_name", ["run", "plan"])
@pytest.mark.parametrize(("foreign", "share"), [(1, None), (9, "10 %")])
def test_many_unknown_tokens_are_said(
    project: Path, command_name: str, foreign: int, share: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """``run`` says it before it starts Ray, which is where the fixture ends it."""
    (project / "text.txt").write_text(("ba " * 81 + "\n").replace("ba", "bab") + "x " * foreign + "\n")
    arguments = [command_name, "--recipe", f"{project}/recipe.yaml"]
    if command_name == "plan":
        main(arguments)
    else:
        with pytest.raises(pytest.fail.Exception, match="Ray was started"):
            main(arguments)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: corpus")]
    if share is None:
        assert warnings == []
    else:
        (line,) = warnings
        assert line.startswith(f"warning: corpus.path: {share} of the tokens of the sample are unknown to")


def test_a_document_longer_than_the_sampled_places_is_no_mistake(project: Path) -> None:
    """None of the sixteen places has the start of a document."""
    (project / "text.txt").write_text("bab " * 500_000)
    with pytest.raises(pytest.fail.Exception, match="Ray was started"):
        main(["run", "--recipe", f"{project}/recipe.yaml"])


def test_there_are_enough_kinds_of_bad_input() -> None:
    assert len(BAD) >= 30


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(
    project: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, words, named = BAD[name]
    spoil(project)
    is_command = words[:1] in (["run"], ["plan"], ["verify"], ["inspect"])
    arguments = [word.format(root=project) for word in (words if is_command else [*RUN, *words])]
    before = contents(project)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(lambda: main(arguments))
    printed = capfd.readouterr()
    lines = printed.err.splitlines()
    assert ended.value.code == 2, printed
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert "hunter2" not in lines[0]
    for part in named:
        assert part.format(root=project) in lines[0]
    assert contents(project) == before
