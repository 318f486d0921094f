"""``plan``: what it extrapolates, and what it says of soft targets, against naive oracles."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from infra.errors import UserError
from infra.recipe import load_recipe
from infra.sections import Corpus, Sequences
from offline_teacher.corpus.documents import documents, parts
from offline_teacher.corpus.problems import Problems
from offline_teacher.corpus.sample import sample_corpus
from offline_teacher.main import main
from offline_teacher.planning import plan
from offline_teacher.planning.recommendation import recommend
from offline_teacher.planning.relations import relation_gradient
from offline_teacher.planning.report import amount, counted, figure, hours
from offline_teacher.planning.soft_targets import (
    DenseHead,
    SoftTarget,
    as_run,
    as_stored,
    exact,
    gradient_errors,
    kept_mass,
    renormalised,
    tail_bucket,
    top_k_targets,
)
from offline_teacher.sequences.packing import Encoder, TextSeen, batched, load_encoder, pack
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
def head() -> BertForMaskedLM:
    """A masked LM of which only the head is used; logits are far apart."""
    config = BertConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    generator = torch.Generator().manual_seed(0)
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.cls.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.cls.predictions.transform.LayerNorm.weight += 1
        model.cls.predictions.decoder.weight *= 0.4
    return model


def hidden_states(seed: int) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


# Soft targets


def test_kept_mass_is_that_of_a_naive_float64_softmax(head: BertForMaskedLM) -> None:
    hidden, ks, temperatures = hidden_states(0), [1, 8, 64, V], [1.0, 2.0, 4.0]
    logits = DenseHead(head).double()(hidden.double()).detach().numpy()
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
def test_top_k_gradients_are_those_of_autograd(head: BertForMaskedLM, tail: bool, temperature: float) -> None:
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


def all_targets(hidden: torch.Tensor) -> list[SoftTarget]:
    """Every form that a store without replayed layers can hold."""
    kept = [SoftTarget(exact(kind), hidden=as_stored(hidden, kind)) for kind in ("int8", "float16")]
    return [*top_k_targets(8), *kept]


def test_a_student_that_is_its_teacher_has_nothing_to_compare(head: BertForMaskedLM) -> None:
    hidden = hidden_states(0)
    errors = gradient_errors(DenseHead(head), hidden, hidden, all_targets(hidden), 2.0)
    assert not np.isfinite(list(errors.values())).any()


def test_gradient_error_is_that_of_the_heads_parameters(head: BertForMaskedLM) -> None:
    """By autograd in float64 through the whole head, one soft target at a time."""
    hidden, student = hidden_states(0), hidden_states(1)
    int8 = SoftTarget(exact("int8"), hidden=as_stored(hidden, "int8"))

    def gradient(teacher_hidden: torch.Tensor) -> torch.Tensor:
        dense = DenseHead(head).double()
        loss = kl(SoftTarget("dense"), dense(teacher_hidden.double()).detach(), dense(student.double()), 2.0)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(dense.parameters()))])

    assert int8.hidden is not None
    truth = gradient(hidden)
    expected = float((gradient(int8.hidden) - truth).norm() / truth.norm())
    found = gradient_errors(DenseHead(head), hidden, student, [int8], 2.0)
    assert found == {exact("int8"): pytest.approx(expected, rel=1e-2)}


def test_exact_targets_are_nearly_right_and_renormalised_ones_badly_wrong(head: BertForMaskedLM) -> None:
    hidden = hidden_states(0)
    close = hidden + 0.05 * (hidden_states(1) - hidden)
    errors = gradient_errors(DenseHead(head), hidden, close, all_targets(hidden), 2.0)
    assert errors[exact("float16")] < 1e-2 < errors[exact("int8")] < 0.5
    assert errors[tail_bucket(8)] < 1 < errors[renormalised(8)]


def test_the_gradient_of_relations_is_that_of_the_textbook() -> None:
    """KL(softmax(t t^T / sqrt d) || softmax(s s^T / sqrt d)) by loops and finite differences, in float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, 6, generator=generator, dtype=torch.float64)
    count, heads, step = torch.tensor([3]), 2, 1e-6

    def loss(own: torch.Tensor) -> float:
        total = 0.0
        for head in range(heads):
            t, s = (x[0, :3, 3 * head : 3 * head + 3] for x in (teacher, own))
            for row in range(3):
                p, q = (torch.softmax(x[row] @ x.T / 3**0.5, -1) for x in (t, s))
                total += float((p * (p / q).log()).sum())
        return total

    expected = torch.zeros_like(student)
    for place in np.ndindex(*student.shape):
        up, down = student.clone(), student.clone()
        up[place], down[place] = up[place] + step, down[place] - step
        expected[place] = (loss(up) - loss(down)) / (2 * step)
    found = relation_gradient([student], [teacher], count, heads)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-6, atol=1e-8)


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
    monkeypatch.setattr("offline_teacher.corpus.sample.PLACE_BYTES", 1 << 12)
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
    assert report["gradient_error"]["student_layers"] == [0, 3]
    errors = report["gradient_error"]
    assert errors["as_run"] == {exact(kind): as_run(kind, "bfloat16") for kind in ("int8", "float16")}
    forms = {exact(kind, n) for kind in ("int8", "float16") for n in (0, 1)}
    assert forms | set(errors["as_run"].values()) < set(errors["at_initialisation"])
    assert max(errors["at_initialisation"][exact("float16", n)] for n in (0, 1)) < 1e-3
    relations = report["relation_error"]["errors"]
    assert relations["float16 input of the last layer"] < 2e-3 < relations["int8 input of the last layer"]


def test_bytes_are_those_of_the_layout(planned: tuple[Path, dict, str]) -> None:
    _, report, _ = planned
    layout = Layout(16, 3, 93, 32, 5, (1.0, 2.0), "float16", "all")
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
        made |= {as_run(kind, "bfloat16"): error for kind, error in worst.items()}
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


def test_replayed_layers_are_recommended_where_they_pay(planned: tuple[Path, dict, str]) -> None:
    _, report, file = planned

    def advice(*overrides: str) -> str:
        return " ".join(recommend(report, load_recipe(file, list(overrides))))

    assert "Leave store.replay_layers=0" in advice()
    narrow = advice("student.hidden_size=16", "student.init=random")
    assert "Set store.replay_layers=1: it takes the same bytes" in narrow
    assert "narrow students learn best" in narrow
    relations = advice("store.replay_layers=1", "train.alpha_relation=1")
    assert "store.replay_layers=1 pays here" in relations
    assert "Their gradient is then off by" in relations


def test_a_step_costs_what_its_products_cost(planned: tuple[Path, dict, str]) -> None:
    """Two layers of D = 32, I = 48, L = 16; the student's and the teacher's product with V = 93."""
    layer = 8 * 32**2 + 4 * 32 * 48 + 4 * 16 * 32
    cost = planned[1]["step"]["student"]
    assert cost["replay"] == layer
    assert cost["projections"] == 6 * 32**2
    assert cost["student"] == 3 * 2 * layer
    assert cost["vocabulary"] == 3 * 2 * 32 * 93 + 2 * 32 * 93


@pytest.mark.parametrize("sentence_encoder", [False, True])
def test_a_teacher_without_a_head_is_planned(tmp_path: Path, model: Path, sentence_encoder: bool) -> None:
    """Only hidden states and relations, or pooled vectors, are told of; nothing over the vocabulary."""
    encoder = save_encoder(tmp_path / "encoder", model)
    text = write_text(tmp_path / "text.txt", 60)
    store = {"top_k": 0, **({"positions": "pooled"} if sentence_encoder else {"replay_layers": 1})}
    recipe = write_recipe(
        tmp_path,
        text,
        encoder,
        store=store,
        sequences={"length": 16, "packing": "document"},
        train={"alpha_ce": 0, "alpha_mlm": 0, "alpha_cos": 0, "alpha_relation": 1},
    )
    assert main(["plan", "--recipe", str(recipe)]) == 0
    report = json.loads((tmp_path / "runs/tiny/plan/plan.json").read_text())
    assert report["kept_mass"] is report["gradient_error"] is None
    assert (report["relation_error"] is None) == sentence_encoder
    assert ("embedding" in report["bytes"]["this recipe"]["columns"]) == sentence_encoder
    made = {path.name for path in (tmp_path / "runs/tiny/plan").glob("*.png")}
    assert made == {"bytes_per_token.png"}


def save_encoder(directory: Path, model: Path) -> Path:
    """The encoder of a masked LM alone, with a sentence encoder's files."""
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    BertForMaskedLM.from_pretrained(model).bert.save_pretrained(directory)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    return directory


def test_a_student_as_deep_as_its_teacher(
    planned: tuple[Path, dict, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--recipe", planned[2], "student.layers=last:4", f"output={tmp_path}"]) == 0
    report = json.loads((tmp_path / "tiny/plan/plan.json").read_text())
    for student in ("at_initialisation", "close_to_teacher"):
        assert set(report["gradient_error"][student].values()) == {None}
    printed = capsys.readouterr().out
    assert re.search(r"top-5, renormalised +- +-\n", printed)
    assert report["relation_error"] is None
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
