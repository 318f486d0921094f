"""What is wrong with a recipe, a store or a place: one clear line, nothing trained, nothing half-written."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from infra.errors import UserError
from offline_teacher.models.weights import named_weights
from offline_teacher.store import writer
from offline_teacher.store.manifest import CONFIG, WEIGHTS
from student_train.engine import world as worlds
from student_train.engine.world import World
from tests.store import synthetic
from tests.student_train import tiny_run
from tests.student_train.tiny_run import V, command, make_store, make_teacher, student

POOLED = {"positions": "pooled", "top_k": 0, "hidden_states": "none", "masked": 0}
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
WORDS = "bert.embeddings.word_embeddings.weight"
DENSE = "cls.predictions.transform.dense.weight"
RELATIONS = ["train.alpha_ce=0", "train.alpha_mlm=0", "train.alpha_cos=0", "train.alpha_relation=1"]


def store(root: Path) -> Path:
    return root / "runs" / "tiny" / "store"


def nothing(root: Path) -> None: ...


def no_recipe(root: Path) -> None:
    (root / "recipe.yaml").unlink()


def recipe_with(**sections: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "recipe.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | sections))

    return change


def no_store(root: Path) -> None:
    shutil.rmtree(store(root))


def store_of(**layout: Any) -> Callable[[Path], None]:
    def rebuild(root: Path) -> None:
        no_store(root)
        make_store(store(root), make_teacher(), **layout)

    return rebuild


def format_1(root: Path) -> None:
    no_store(root)
    store(root).mkdir()
    (store(root) / "declaration.json").write_text("{}")


def incomplete(root: Path) -> None:
    (store(root) / "manifest.json").unlink()
    next((store(root) / "tasks" / "train").iterdir()).unlink()


def half_a_manifest(root: Path) -> None:
    path = store(root) / "manifest.json"
    path.write_bytes(path.read_bytes()[:-30])


def flipped(pattern: str) -> Callable[[Path], None]:
    """A bit in the middle of every file of the store whose path matches."""

    def flip(root: Path) -> None:
        paths = sorted(store(root).glob(pattern))
        assert paths
        for path in paths:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(bytes(data))

    return flip


def shards_gone(root: Path) -> None:
    shutil.rmtree(store(root) / "shards" / "train")


def impossible(column: str, value: int) -> Callable[[Path], None]:
    """A store whose digests are right and whose numbers are not: its writer did not look at them."""

    def rebuild(root: Path) -> None:
        real = writer.TaskWriter.write

        def write(self: Any, columns: dict[str, np.ndarray]) -> None:
            columns[column].flat[0] = value
            real(self, columns)

        with (
            mock.patch.object(writer.TaskWriter, "write", write),
            mock.patch.object(writer, "check_block", return_value=()),
        ):
            store_of()(root)

    return rebuild


def packed_texts(root: Path) -> None:
    """A sentence encoder's store of tokens, whose sequences are cut out of running text."""
    with mock.patch.object(tiny_run, "_document_spec", synthetic.make_spec):
        store_of(documents=True)(root)


def teacher_without_a_head(root: Path) -> None:
    kept = named_weights(make_teacher().bert)
    no_store(root)
    with mock.patch.object(tiny_run, "named_weights", return_value=kept):
        make_store(store(root), make_teacher())


def hostile(
    change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None, **config: Any
) -> Callable[[Path], None]:
    """A store whose digests are right and whose teacher is none: other tensors, or another configuration."""

    def rebuild(root: Path) -> None:
        teacher = make_teacher()
        tensors = {name: tensor.detach().clone() for name, tensor in named_weights(teacher).items()}
        change(tensors)
        told = {**teacher.config.to_dict(), **config}
        no_store(root)
        with (
            mock.patch.object(tiny_run, "named_weights", return_value=tensors),
            mock.patch.object(type(teacher.config), "to_dict", return_value=told),
        ):
            make_store(store(root), teacher)

    return rebuild


def hostile_file(data: bytes) -> Callable[[Path], None]:
    """In the place of the teacher's weights."""

    def rebuild(root: Path) -> None:
        no_store(root)
        with mock.patch.object(synthetic, "save", return_value=data):
            make_store(store(root), make_teacher())

    return rebuild


def hostile_pooling(**told: Any) -> Callable[[Path], None]:
    def rebuild(root: Path) -> None:
        with mock.patch.object(synthetic, "POOLED", told):
            store_of(**POOLED)(root)

    return rebuild


def file_in_the_way(root: Path) -> None:
    student(root).parent.mkdir()
    student(root).write_text("in the way")


def deepspeed_json(text: str) -> Callable[[Path], None]:
    return lambda root: (root / "ds.json").write_text(text) and None


def started(*overrides: str, then: Callable[[Path], None] = nothing) -> Callable[[Path], None]:
    def train(root: Path) -> None:
        command(root, "train.epochs=1", *overrides)
        then(root)

    return train


def all_checkpoints_damaged(root: Path) -> None:
    shutil.rmtree(student(root) / "model")
    for path in (student(root) / "checkpoints").glob("*/weights.safetensors"):
        path.write_bytes(b"")


BAD: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    # The recipe
    "no recipe": (no_recipe, [], ["recipe.yaml"]),
    "unknown key": (nothing, ["train.lerning_rate=1"], ["lerning_rate", "learning_rate"]),
    "wrong type": (nothing, ["train.batch_size=many"], ["train.batch_size"]),
    "out of range": (nothing, ["train.epochs=0"], ["epochs"]),
    "not an override": (nothing, ["train"], ["train"]),
    "batch not divisible": (nothing, ["train.batch_size=7"], ["batch_size", "micro_batch_size"]),
    "no loss": (nothing, RELATIONS[:3], ["no loss"]),
    "no relation": (nothing, ["train.relation_weights=[0, 0, 0]"], ["relation_weights", "not all 0"]),
    "less than no time": (nothing, ["train.checkpoint_minutes=-1"], ["checkpoint_minutes", ">= 0"]),
    "no such student": (nothing, ["--student", "studnet"], ["'studnet'", "did you mean student?"]),
    "two students of one name": (
        recipe_with(students={"half": {}, "Half": {}}), [], ["Half, half", "upper and lower case"],
    ),
    "a student that is no mapping": (recipe_with(students={"half": 3}), [], ["students.half", "mapping"]),
    "a student's unknown section": (
        recipe_with(students={"half": {"trian": {}}}), [], ["students.half", "did you mean train?"],
    ),
    "a student's unknown key": (
        recipe_with(students={"half": {"train": {"epoch": 1}}}), [], ["students.half", "mean epochs?"],
    ),
    "an override of no student": (
        recipe_with(students={"half": {}}), ["students.haf.train.seed=1"], ["haf", "did you mean half?"],
    ),
    # The store
    "no store": (no_store, [], ["tiny/store"]),
    "no store at a path": (nothing, ["store.path={root}/absent"], ["{root}/absent"]),
    "a store of format 1": (format_1, [], ["tiny/store", "format 1", "make it again"]),
    "store incomplete": (incomplete, [], ["tiny/store", "incomplete", "1 of"]),
    "manifest damaged": (half_a_manifest, [], ["manifest.json", "verify"]),
    "spec damaged": (flipped("spec.json"), [], ["spec.json", "verify"]),
    "index damaged": (flipped("tasks/train/*.json"), [], ["tasks/train/e000", "verify"]),
    "shards damaged": (flipped("shards/train/*/*.arrow"), [], ["shards/train/e000", "sample", "verify"]),
    "held-out shards damaged": (
        flipped("shards/validation/*/*.arrow"), ["train.epochs=1"], ["shards/validation/e000", "verify"],
    ),
    "teacher's configuration damaged": (flipped(CONFIG), [], [CONFIG, "verify"]),
    "teacher's weights damaged": (flipped(WEIGHTS), [], [WEIGHTS, "verify"]),
    "tokenizer damaged": (flipped("tokenizer/tokenizer.json"), ["train.epochs=1"], ["tokenizer/", "verify"]),
    "shards gone": (shards_gone, [], ["shards/train/e000", "missing"]),
    "a label beyond the vocabulary": (
        impossible("masked_labels", V), [], ["masked_labels", "outside 0 to 95", "verify"],
    ),
    "a token beyond the vocabulary": (impossible("input_ids", V + 7), [], ["input_ids", "outside 0 to 95"]),
    "a top-k id beyond the vocabulary": (
        impossible("topk_ids", V), ["train.soft_targets=topk", "train.alpha_cos=0"], ["topk_ids", "outside"],
    ),
    "no token in a sample": (impossible("token_count", 0), [], ["token_count", "outside 1 to 12"]),
    "a masked position beyond the length": (
        impossible("masked_positions", 12), [], ["masked_positions", "outside -1 to 11"],
    ),
    # What a loss needs of it
    "teacher's weights withheld": (
        store_of(teacher_weights=False), [], ["student.init: teacher", "teacher_weights: false", "random"],
    ),
    "exact without hidden states": (
        store_of(hidden_states="none"),
        ["train.soft_targets=exact", "train.alpha_cos=0"],
        ["train.soft_targets", "hidden states"],
    ),
    "cosine without hidden states": (
        store_of(hidden_states="none"), [], ["train.alpha_cos", "hidden states"],
    ),
    "topk without top-k": (store_of(top_k=0), ["train.soft_targets=topk"], ["train.soft_targets", "top-k"]),
    "temperature not stored": (
        nothing,
        ["train.soft_targets=topk", "train.temperature=3"],
        ["train.temperature: 3", "[1.0, 2.0]"],
    ),
    "all positions of a masked store": (store_of(positions="masked"), [], ["kl_positions", "masked"]),
    "relations without replayed layers": (nothing, RELATIONS, ["train.alpha_relation", "replay_layers: 1"]),
    "masked LM of text that is not masked": (store_of(masked=0), [], ["train.alpha_mlm", "not masked"]),
    "masked positions of text that is not masked": (
        store_of(masked=0), ["train.alpha_mlm=0", "train.kl_positions=masked"], ["kl_positions: masked"],
    ),
    "one vector a text": (
        store_of(positions="pooled", top_k=0, hidden_states="none", masked=0),
        [],
        ["pooled", "positions: all"],
    ),
    "vectors beside another term": (
        store_of(positions="pooled", top_k=0, hidden_states="none", masked=0),
        ["train.alpha_ce=0", "train.alpha_mlm=0", "train.alpha_embedding=1"],
        ["train.alpha_cos", "pooled", "train.alpha_embedding: 1"],
    ),
    "vectors of a teacher that makes none": (
        nothing, ["train.alpha_embedding=1"], ["train.alpha_embedding", "no sentence encoder"],
    ),
    "vectors of sequences that are no texts": (
        packed_texts, ["train.alpha_embedding=1"], ["train.alpha_embedding", "packing: document"],
    ),
    "vectors of masked positions": (
        store_of(positions="masked"),
        ["train.alpha_embedding=1", "train.kl_positions=masked"],
        ["train.alpha_embedding", "positions: all"],
    ),
    "vectors made in no known way": (
        hostile_pooling(mode="max", normalise=True, prompts={}, default_prompt=None, max_length=None),
        [*RELATIONS[:3], "train.alpha_embedding=1"], ["pooling.json", "'max'"],
    ),
    "vectors of which nothing is said": (
        hostile_pooling(mode="mean"), [*RELATIONS[:3], "train.alpha_embedding=1"], ["pooling.json"],
    ),
    # A live teacher
    "an unknown teacher": (nothing, ["train.teacher=both"], ["train.teacher", "store", "live"]),
    "a live teacher's top-k": (
        nothing, ["train.teacher=live", "train.soft_targets=topk"], ["soft_targets: topk", "exact"],
    ),
    "a live teacher whose weights are withheld": (
        store_of(teacher_weights=False),
        ["train.teacher=live", "student.init=random"],
        ["train.teacher: live", "teacher_weights: false", "train.teacher: store"],
    ),
    "a live teacher of text that is not masked": (
        store_of(masked=0), ["train.teacher=live"], ["train.alpha_mlm", "not masked"],
    ),
    # A teacher that is none, with the right digests
    "weights of another shape": (
        hostile(lambda x: x.update({QUERY: x[QUERY][:, 1:]})), [], ["model.safetensors", "size mismatch"],
    ),
    "another vocabulary's words": (
        hostile(lambda x: x.update({WORDS: x[WORDS][1:]})), [], ["model.safetensors", "size mismatch"],
    ),
    "a weight missing": (hostile(lambda x: x.pop(QUERY)), [], ["model.safetensors lacks", QUERY]),
    "words missing": (hostile(lambda x: x.pop(WORDS)), [], ["model.safetensors lacks", WORDS]),
    "a live teacher's weight missing": (
        hostile(lambda x: x.pop(QUERY)), ["train.teacher=live", "student.layers=[1]"], ["lacks", QUERY],
    ),
    "hardly a weight": (
        hostile(lambda x: [x.pop(name) for name in list(x)[1:]]), [], ["model.safetensors lacks", "more"],
    ),
    "a weight that is no number": (
        hostile(lambda x: x[QUERY].view(-1)[3:4].fill_(torch.nan)), [], [QUERY, "not finite"],
    ),
    "an infinite weight": (
        hostile(lambda x: x[DENSE].view(-1)[3:4].fill_(torch.inf)), [], [DENSE, "not finite"],
    ),
    "weights that are integers": (
        hostile(lambda x: x.update({QUERY: x[QUERY].int()})), [], ["tiny/store", "model.safetensors"],
    ),
    "weights that are no safetensors": (hostile_file(b"\x80\x04pickled"), [], ["tiny/store", "safetensors"]),
    "an empty file of weights": (hostile_file(b""), [], ["tiny/store", "safetensors"]),
    "weights cut short": (hostile_file(b"\xff" * 64), [], ["tiny/store", "safetensors"]),
    "a configuration of another width": (hostile(hidden_size=32), [], ["config.json", "hidden_size is 32"]),
    "a configuration of other words": (hostile(vocab_size=97), [], ["config.json", "vocab_size is 97"]),
    "a configuration without end": (hostile(num_hidden_layers=10**9), [], ["num_hidden_layers is 100"]),
    "a depth that is no number": (hostile(num_hidden_layers="two"), [], ["num_hidden_layers is two"]),
    "deeper than its weights": (
        hostile(num_hidden_layers=4), ["student.layers=last:1"], ["lacks", "bert.encoder.layer.2"],
    ),
    "heads that do not divide": (hostile(num_attention_heads=3), [], ["config.json", "3 attention heads"]),
    "an unknown activation": (hostile(hidden_act="evil"), [], ["config.json", "evil"]),
    "a family of decoders": (hostile(model_type="llama"), [], ["llama"]),
    "more neurons than any memory holds": (
        hostile(intermediate_size=10**12), [], ["model.safetensors", "size mismatch"],
    ),
    "fewer positions than a sequence": (
        hostile(max_position_embeddings=4), [], ["config.json", "4 tokens", "12"],
    ),
    "an epsilon that is no number": (hostile(layer_norm_eps="x"), [], ["tiny/store", "config.json"]),
    "vocabulary of a teacher without a head": (teacher_without_a_head, [], ["masked-LM head"]),
    # The student
    "deeper than its teacher": (nothing, ["student.layers=last:5"], ["last:5", "2 layers"]),
    "no such layer": (nothing, ["student.layers=[0, 7]"], ["layer 7"]),
    "width and heads": (nothing, ["student.hidden_size=9", "student.init=random"], ["hidden_size", "heads"]),
    "wider than the teacher's layers": (
        nothing, ["student.hidden_size=32"], ["student.hidden_size: 32", "teacher's 16", "init: random"],
    ),
    "heads that cannot be cut out of the teacher's": (
        nothing,
        ["student.hidden_size=12", "student.attention_heads=1"],
        ["student.attention_heads", "init: random"],
    ),
    "no neurons": (nothing, ["student.intermediate_size=0"], ["intermediate_size", ">= 1"]),
    "relation heads that do not divide": (
        store_of(replay_layers=1), [*RELATIONS, "train.relation_heads=3"], ["train.relation_heads: 3", "16"],
    ),
    "no such layer of relations": (
        store_of(replay_layers=1), [*RELATIONS, "train.relation_layer=4"], ["no layer 4", "1 layers"],
    ),
    "no such layer of relations from the end": (
        store_of(replay_layers=1), [*RELATIONS, "train.relation_layer=-2"], ["train.relation_layer", "-2"],
    ),
    # The run
    "loss not finite": (
        nothing,
        ["train.learning_rate=1e30", "train.warmup_ratio=0", "train.checkpoint_every=1"],
        ["step 1", "not a finite number", "part/row", "checkpoints/step-00000001"],
    ),
    "loss not finite at stage 2": (
        nothing,
        ["train.learning_rate=1e30", "train.warmup_ratio=0", "train.zero_stage=2", "train.dtype=bfloat16"],
        ["not a finite number", "no checkpoint was written yet"],
    ),
    "output in the way": (file_in_the_way, [], ["students/student"]),
    "no DeepSpeed JSON": (nothing, ["train.deepspeed_config=absent.json"], ["absent.json"]),
    "DeepSpeed JSON is not JSON": (
        deepspeed_json("{"), ["train.deepspeed_config={root}/ds.json"], ["ds.json"],
    ),
    "DeepSpeed JSON contradicts": (
        deepspeed_json('{"gradient_clipping": 1}'),
        ["train.deepspeed_config={root}/ds.json"],
        ["gradient_clipping is 1", "train.max_grad_norm"],
    ),
    "float16 where it cannot be": (nothing, ["train.dtype=float16"], ["float16", "bfloat16"]),
    "other settings than at its start": (
        started(), ["train.epochs=1", "train.seed=1"], ["(train.seed: 0 -> 1)"],
    ),
    "another store than at its start": (
        started(then=store_of(sequences=40)), ["train.epochs=1"], ["store: 'xxh3-128:"],
    ),
    "no valid checkpoint": (
        started(then=all_checkpoints_damaged), ["train.epochs=1"], ["no valid checkpoint is left"],
    ),
}  # fmt: skip


def test_there_are_enough_kinds_of_bad_input() -> None:
    assert len(BAD) >= 80


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(
    alone: World, run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    prepare, words, named = BAD[name]
    prepare(run_dir)
    with pytest.raises(UserError) as raised:
        command(run_dir, *(word.replace("{root}", str(run_dir)) for word in words))
    line = str(raised.value)
    assert "\n" not in line
    for part in named:
        assert part.replace("{root}", str(run_dir)) in line
    assert not (student(run_dir) / "model").exists() or "at its start" in name


def test_more_ranks_than_samples(
    alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worlds, "start_world", lambda: World(0, 51, torch.device("cpu")))
    with pytest.raises(SystemExit) as ended:
        command(run_dir)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: 51 ranks for the store of 50 sequences")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_that_another_program_has(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"--master_port: another program has port {port}"):
            worlds.start_world()
