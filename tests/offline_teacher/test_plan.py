"""``plan``: what it extrapolates, and what it says of soft targets, against naive oracles."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from offline_teacher.store.head import MlmHead
from offline_teacher.teacher import load_teacher
from transformers import BertForMaskedLM

from infra.errors import UserError
from infra.recipe import load_recipe
from infra.sections import Corpus, Sequences, Student, Teacher
from offline_teacher import corpus_sample, plan
from offline_teacher.corpus import documents, parts
from offline_teacher.corpus_problems import Problems
from offline_teacher.corpus_sample import sample_corpus
from offline_teacher.main import main
from offline_teacher.packing import Encoder, TextSeen, batched, load_encoder, pack
from offline_teacher.plan_report import amount, counted, figure, hours, recommend
from offline_teacher.soft_target_error import (
    DenseHead,
    SoftTarget,
    captured,
    exact,
    gradient_errors,
    kept_mass,
    only_layers,
    renormalised,
    soft_targets,
    student_layers,
    tail_bucket,
)
from offline_teacher.store.schema import Layout
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

V, D, N = 211, 16, 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("plan") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def encoder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """Of the tokenizer's files alone, as a store has them."""
    directory = tmp_path_factory.mktemp("tokenizer")
    for path in model.glob("*token*"):
        (directory / path.name).write_bytes(path.read_bytes())
    return load_encoder(str(directory))


@pytest.fixture(scope="module")
def head() -> MlmHead:
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return MlmHead(array(D, D), array(D), 1 + array(D), array(D), 0.4 * array(V, D), array(V), "gelu", 1e-12)


def hidden_states(seed: int) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


# Soft targets


def test_kept_mass_is_that_of_a_naive_float64_softmax(head: MlmHead) -> None:
    hidden, ks, temperatures = hidden_states(0), [1, 8, 64, V], [1.0, 2.0, 4.0]
    logits = head.logits(hidden.numpy().astype(np.float64))
    for j, row in enumerate(kept_mass(DenseHead(head), hidden, ks, temperatures)):
        p = np.exp(logits / temperatures[j])
        p = -np.sort(-p / p.sum(axis=1, keepdims=True), axis=1)
        assert row == pytest.approx([p[:, :k].sum(axis=1).mean() for k in ks], rel=1e-5)
        assert row[-1] == pytest.approx(1.0)


def kl(target: SoftTarget, teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL, summed over positions, written as a textbook has it; float64 logits [N, V]."""
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    if not target.top_k:
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    ids = teacher.topk(target.top_k).indices
    log_p, log_q = log_p.gather(1, ids), log_q.gather(1, ids)
    if target.tail:
        log_p, log_q = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1) for x in (log_p, log_q))
    else:
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_gradients_are_those_of_autograd(head: MlmHead, tail: bool, temperature: float) -> None:
    dense = DenseHead(head).double()
    target = SoftTarget("top", top_k=8, tail=tail)
    teacher = dense(hidden_states(0).double()).detach().half().double()  # as a store rounds them
    student = dense(hidden_states(1).double()).detach().requires_grad_()
    (expected,) = torch.autograd.grad(kl(target, teacher, student, temperature), student)
    q = torch.softmax(student.detach() / temperature, -1)
    found = temperature * target.gradient(dense, slice(0, N), teacher, q, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_tail_far_below_the_top_k_has_a_gradient() -> None:
    """The student's tail mass is 1e-26 here: 1 minus the rest is 0."""
    teacher = torch.tensor([[2.0, 1.5, 1.0, 0.5]], dtype=torch.float64)
    student = torch.tensor([[9.0, 1.0, 3.0, 2.0]], dtype=torch.float64)
    q = torch.softmax(student / 0.1, -1)
    found = SoftTarget("top", top_k=2, tail=True).gradient(
        torch.nn.Identity(),
        slice(0, 1),
        teacher,
        q,
        0.1,  # type: ignore[arg-type]
    )
    p = torch.softmax(teacher / 0.1, -1)
    share = torch.softmax(student[:, 2:] / 0.1, -1)
    expected = torch.cat([q[:, :2] - p[:, :2], q[:, 2:] - p[:, 2:].sum() * share], 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_compare(head: MlmHead) -> None:
    hidden = hidden_states(0)
    errors = gradient_errors(DenseHead(head), hidden, hidden, soft_targets(hidden, 8), 2.0)
    assert not np.isfinite(list(errors.values())).any()


def test_gradient_error_is_that_of_the_heads_parameters(head: MlmHead) -> None:
    """By autograd in float64 through the whole head, one soft target at a time."""
    hidden, student = hidden_states(0), hidden_states(1)
    int8 = next(target for target in soft_targets(hidden, 8) if target.name == exact("int8"))

    def gradient(teacher_hidden: torch.Tensor) -> torch.Tensor:
        dense = DenseHead(head).double()
        loss = kl(SoftTarget("dense"), dense(teacher_hidden.double()).detach(), dense(student.double()), 2.0)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(dense.parameters()))])

    assert int8.hidden is not None
    truth = gradient(hidden)
    expected = float((gradient(int8.hidden) - truth).norm() / truth.norm())
    found = gradient_errors(DenseHead(head), hidden, student, [int8], 2.0)
    assert found == {exact("int8"): pytest.approx(expected, rel=1e-2)}


def test_exact_targets_are_nearly_right_and_renormalised_ones_badly_wrong(head: MlmHead) -> None:
    hidden = hidden_states(0)
    close = hidden + 0.05 * (hidden_states(1) - hidden)
    errors = gradient_errors(DenseHead(head), hidden, close, soft_targets(hidden, 8), 2.0)
    assert errors[exact("float16")] < 1e-2 < errors[exact("int8")] < 0.5
    assert errors[tail_bucket(8)] < 1 < errors[renormalised(8)]


def test_layers_of_the_student(model: Path) -> None:
    assert student_layers(Student(), 6) == [0, 2, 4]
    assert student_layers(Student(), 12) == [0, 2, 4, 7, 9, 11]
    assert student_layers(Student(layers="last:2"), 6) == [4, 5]
    for layers, shown in (("last:7", r"\[-1, 0"), ((0, 6), r"\[0, 6\]")):
        with pytest.raises(UserError, match=rf"student\.layers: {shown}"):
            student_layers(Student(layers=layers), 6)
    loaded = load_teacher(Teacher(model=str(model), dtype="float32"), "cpu")
    ids = torch.tensor([[2, 9, 4, 11, 3]])
    whole = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
    with only_layers(loaded, [0, 1]):
        torch.testing.assert_close(loaded.model(input_ids=ids).last_hidden_state, whole[2])
    torch.testing.assert_close(loaded.model(input_ids=ids).last_hidden_state, whole[4])


# The corpus


def write_corpus(directory: Path, kind: str) -> Corpus:
    """About 800 kB in three files of unequal size, in one of the forms a corpus may have."""
    texts = [write_text(directory / f"{i}.txt", lines, seed=i) for i, lines in enumerate((1000, 6000, 3000))]
    if kind in ("line", "block", "file"):
        return Corpus(path=tuple(map(str, texts)), document=kind)  # type: ignore[arg-type]
    if kind == "gz":
        for path in texts:
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        return Corpus(path=(f"{directory}/*.gz",))
    lines = [line for path in texts for line in path.read_text().splitlines()]
    if kind == "jsonl":
        (directory / "all.jsonl").write_text(
            "\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(lines))
        )
        return Corpus(source="jsonl", path=(f"{directory}/all.jsonl",))
    pq.write_table(pa.table({"text": lines}), directory / "all.parquet", row_group_size=200)
    if kind == "hub":
        (directory / "hub").mkdir()
        (directory / "all.parquet").rename(directory / "hub/train.parquet")
        return Corpus(source="hub", path=(f"{directory}/hub",))
    return Corpus(source="parquet", path=(f"{directory}/all.parquet",))


@pytest.mark.parametrize(
    ("kind", "packing"),
    [(kind, "packed") for kind in ("line", "file", "gz", "jsonl", "parquet", "hub")]
    + [(kind, "document") for kind in ("line", "gz", "parquet", "hub")],
)
def test_tokens_are_extrapolated_from_a_part(
    tmp_path: Path, encoder: Encoder, kind: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_sample, "PLACE_BYTES", 1 << 12)
    corpus = write_corpus(tmp_path, kind)
    settings = Sequences(length=16, packing=packing, part_bytes=1 << 14)  # type: ignore[arg-type]
    tokens = sequences = 0
    for part in parts(corpus, settings.part_bytes):
        for _, count in pack(batched(documents(part, corpus, Problems()), TextSeen()), encoder, settings):
            tokens, sequences = tokens + int(count.sum()), sequences + len(count)
    sample = sample_corpus(corpus, settings, encoder)
    assert not sample.exact
    assert len(sample.input_ids) < sequences / 2
    assert sample.tokens == pytest.approx(tokens, rel=0.1)
    assert sample.sequences == pytest.approx(sequences, rel=0.1)


def test_a_small_corpus_is_read_whole(tmp_path: Path, encoder: Encoder) -> None:
    corpus = Corpus(path=(str(write_text(tmp_path / "a.txt", 50)), str(write_text(tmp_path / "b.txt", 9))))
    sample = sample_corpus(corpus, Sequences(length=16, packing="document"), encoder)
    assert sample.exact
    assert sample.sequences == 59
    assert sample.tokens == int(sample.token_count.sum())


def test_what_is_wrong_with_the_sample_is_told(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "empty.txt").write_text("\n\n\n")
    with pytest.raises(UserError, match=r"no usable document.*empty\.txt"):
        sample_corpus(Corpus(path=(str(tmp_path / "empty.txt"),)), Sequences(), encoder)
    (tmp_path / "bad.txt").write_bytes(b"ba do\n\xff ki lu me no ru sa ba do ki lu me no\n")
    sample = sample_corpus(Corpus(path=(str(tmp_path / "bad.txt"),)), Sequences(), encoder)
    assert sample.problems.counts == {"invalid UTF-8": 1}


@pytest.mark.parametrize("wrong", ["invalid bytes", "no column", "damaged"])
def test_rows_with_something_wrong_count_once(tmp_path: Path, encoder: Encoder, wrong: str) -> None:
    lines = write_text(tmp_path / "lines.txt", 6000).read_text().splitlines()
    good, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    raw = pa.array([line.encode() + b" \xff" * (wrong == "invalid bytes") for line in lines])
    texts = pa.StringArray.from_buffers(len(lines), *raw.buffers()[1:])
    pq.write_table(pa.table({"text": texts}), good, row_group_size=200)
    if wrong == "no column":
        pq.write_table(pa.table({"other": lines}), other, row_group_size=200)
    if wrong == "damaged":
        other.write_bytes(good.read_bytes()[:-9])
    corpus = Corpus(source="parquet", path=(f"{tmp_path}/*.parquet",))
    settings = Sequences(length=16, part_bytes=1 << 14)
    tokens = 0
    for part in parts(corpus, settings.part_bytes):
        for _, count in pack(batched(documents(part, corpus, Problems()), TextSeen()), encoder, settings):
            tokens += int(count.sum())
    sample = sample_corpus(corpus, settings, encoder)
    assert not sample.exact
    assert sample.tokens == pytest.approx(tokens, rel=0.1)


# The command


@pytest.fixture(scope="module")
def planned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """The directory of a plan, its report, and the recipe it was made of."""
    directory = tmp_path_factory.mktemp("planned")
    text = write_text(directory / "text.txt", 400)
    recipe = write_recipe(directory, text, model, masking={"epochs": 3})
    assert main(["plan", "--recipe", str(recipe)]) == 0
    found = directory / "runs/tiny/plan"
    return found, json.loads((found / "plan.json").read_text()), str(recipe)


def test_plan_publishes_what_it_documents(planned: tuple[Path, dict, str]) -> None:
    directory, report, _ = planned
    keys = {
        line.split()[0] for line in (plan.__doc__ or "").splitlines() if line[:1].isalpha() and "  " in line
    }
    assert keys == set(report) - {"name"}
    for name in ("kept_mass.png", "gradient_error.png", "bytes_per_token.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    mass = report["kept_mass"]
    assert (
        np.shape(mass["masked"]) == np.shape(mass["unmasked"]) == (len(mass["temperatures"]), len(mass["ks"]))
    )
    assert mass["temperatures"] == [1.0, 2.0, 4.0]
    assert {5, 8} <= set(mass["ks"])
    assert set(report["gradient_error"]["at_initialisation"]) == set(
        report["gradient_error"]["close_to_teacher"]
    )
    assert report["gradient_error"]["student_layers"] == [0, 2]
    as_captured = report["gradient_error"]["as_captured"]
    assert as_captured == {exact(kind): captured(kind, "bfloat16") for kind in ("int8", "float16")}
    assert set(as_captured.values()) < set(report["gradient_error"]["at_initialisation"])


def test_bytes_are_those_of_the_layout(planned: tuple[Path, dict, str]) -> None:
    _, report, _ = planned
    layout = Layout(16, 3, 93, 5, (1.0, 2.0), 32, "float16", "all")
    own, corpus = report["bytes"]["this recipe"], report["corpus"]
    assert own["total"] == 3 * corpus["sequences"] * layout.bytes_per_sample()
    assert own["per_token"] * corpus["tokens"] * 3 == pytest.approx(own["total"])
    assert sum(own["columns"].values()) == pytest.approx(own["per_token"])
    assert set(own["columns"]) == set(layout.columns())
    int8 = report["bytes"]["int8 hidden states"]["columns"]
    assert int8["hidden_states"] == pytest.approx(own["columns"]["hidden_states"] / 2)


def test_hours_share_the_work(planned: tuple[Path, dict, str]) -> None:
    _, report, _ = planned
    time, corpus = report["time"], report["corpus"]
    assert time["hours"]["1"] * 3600 * time["tokens_per_s"] == pytest.approx(3 * corpus["tokens"])
    assert time["hours"]["8"] == pytest.approx(time["hours"]["1"] / 8)


def test_advice_follows_the_figures(planned: tuple[Path, dict, str]) -> None:
    _, report, recipe_file = planned
    recipe = load_recipe(recipe_file)
    errors = report["gradient_error"]
    for good, expected in (("int8", "int8 hidden states"), ("float16", "float16 hidden states")):
        made = dict.fromkeys(errors["at_initialisation"], 0.5) | {exact(good): 0.01}
        altered = {
            **report,
            "gradient_error": {**errors, "at_initialisation": made, "close_to_teacher": made},
        }
        assert recommend(altered, recipe)[0].startswith(f"Store {expected} ")
    made = dict.fromkeys(errors["at_initialisation"], 0.01)
    altered = {**report, "gradient_error": {**errors, "at_initialisation": made, "close_to_teacher": made}}
    without_cosine = load_recipe(recipe_file, ["train.alpha_cos=0"])
    assert recommend(altered, without_cosine)[0].startswith("Store top-5 alone ")
    assert recommend(altered, recipe)[0].startswith("Store int8 hidden states ")


def test_advice_says_what_the_teachers_dtype_adds(planned: tuple[Path, dict, str]) -> None:
    """And takes it into account, unless it alone is too much whatever is stored."""
    _, report, recipe_file = planned
    recipe = load_recipe(recipe_file)

    def advice(**worst: float) -> list[str]:
        made = dict.fromkeys(report["gradient_error"]["at_initialisation"], 0.5)
        made |= {exact("int8"): 0.02, exact("float16"): 0.001}
        made |= {captured(kind, "bfloat16"): error for kind, error in worst.items()}
        errors = {**report["gradient_error"], "at_initialisation": made, "close_to_teacher": made}
        return recommend({**report, "gradient_error": errors}, recipe)

    within = advice(int8=0.045, float16=0.04)
    assert within[0].startswith("Store int8 hidden states ")
    assert "that keeps" in within[0]
    assert "Its error is 0.045 " in within[0]
    crossed = advice(int8=0.062, float16=0.041)
    assert crossed[0].startswith("Store float16 hidden states ")
    assert "Its error is 0.041 " in crossed[0]
    whatever = advice(int8=0.064, float16=0.059)
    assert whatever[0].startswith("Store int8 hidden states ")
    assert "that by itself keeps" in whatever[0]
    (dtype,) = (sentence for sentence in whatever if "bfloat16" in sentence)
    assert "0.059" in dtype
    assert "more than 5 %, whatever is stored" in dtype
    assert "teacher.dtype=float32" in dtype


def test_a_student_as_deep_as_its_teacher(
    planned: tuple[Path, dict, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--recipe", planned[2], "student.layers=last:4", f"output={tmp_path}"]) == 0
    report = json.loads((tmp_path / "tiny/plan/plan.json").read_text())
    for student in ("at_initialisation", "close_to_teacher"):
        assert set(report["gradient_error"][student].values()) == {None}
    printed = capsys.readouterr().out
    assert "top-5, renormalised               -                    -\n" in printed
    assert "No form of store is recommended" in printed
    assert "nothing to compare" in printed


def test_without_the_gpus_of_the_recipe_the_cpu_is_measured(
    planned: tuple[Path, dict, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpus = ["teacher.gpus_per_worker=1", "teacher.dtype=float32"]
    assert main(["plan", "--recipe", planned[2], *gpus, f"output={tmp_path}"]) == 0
    report = json.loads((tmp_path / "tiny/plan/plan.json").read_text())
    assert (report["time"]["device"], report["time"]["gpus_per_worker"]) == ("cpu", 1)
    assert "With 1 worker like this one" in report["recommendation"][-1]
    assert "GPUs" in report["recommendation"][-1]
    assert "teacher.gpus_per_worker=1) and there is none here" in capsys.readouterr().out


def test_a_dtype_too_narrow_for_the_teacher_is_refused(
    planned: tuple[Path, dict, str], tmp_path: Path
) -> None:
    teacher = save_bert(tmp_path / "model", num_hidden_layers=4)
    model = BertForMaskedLM.from_pretrained(teacher)
    torch.nn.init.constant_(model.bert.encoder.layer[-1].output.LayerNorm.bias, 1e6)
    model.save_pretrained(teacher)
    with pytest.raises(UserError, match=r"teacher\.dtype: .*float16 are not all finite"):
        main(["plan", "--recipe", planned[2], f"teacher.model={teacher}", "teacher.dtype=float16"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("corpus.path=absent/*.txt", "matches no file"),
        ("teacher.model=./absent", "teacher.model"),
        ("sequences.length=65", "sequences.length: 65"),
        ("store.top_k=1000", "store.top_k: 1000"),
        ("student.layers=last:9", "student.layers"),
    ],
)
def test_bad_inputs_are_one_clear_line(planned: tuple[Path, dict, str], override: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        main(["plan", "--recipe", planned[2], override])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_figures_are_read_at_a_glance() -> None:
    assert [figure(x) for x in (212.4, 5.46, 0.0123, 0.0000218, 1e-9)] == [
        "212",
        "5.5",
        "0.012",
        "0.000022",
        "< 0.00001",
    ]
    assert [amount(x, "bytes") for x in (12, 15_500_000, 3.02e9)] == ["12 bytes", "15.5 MB", "3.0 GB"]
    assert [hours(x) for x in (0.001, 0.5, 3, 480)] == ["3.6 s", "30.0 min", "3.0 h", "480 h (20.0 days)"]
    assert figure(None) == "-"
    assert [counted(x, "batch", "batches") for x in (1, 2000)] == ["1 batch", "2,000 batches"]
