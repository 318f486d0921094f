"""``inspect``: what it says of distributions that are known whole, or only in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes

from infra.errors import UserError
from offline_teacher.main import main
from offline_teacher.store.store import Store
from offline_teacher.verification import sample_view
from offline_teacher.verification.kept_mass_plot import plot_kept_mass
from offline_teacher.verification.sample_view import Distributions, TaskView
from tests.offline_teacher.local_pool import make
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

matplotlib.use("Agg")
V = 93


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("view")
    text, model = write_text(directory / "text.txt", 20), save_bert(directory / "model", scale=0.5)
    held_out = write_text(directory / "held_out.txt", 4, seed=1)
    return write_recipe(
        directory,
        text,
        model,
        corpus={"path": [str(text)], "validation_path": [str(held_out)]},
        teacher={"dtype": "float32"},
    )


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Store:
    """A store with hidden states, from which a layer is replayed, and the top 5 of 93 tokens."""
    overrides = ("store.replay_layers=1", "masking.epochs=2", f"store.path={recipe.parent}/whole")
    return make(recipe, *overrides)


@pytest.fixture(scope="module")
def top_k(recipe: Path) -> Store:
    """The same without the hidden states."""
    without = ("store.hidden_states=none", "train.alpha_cos=0")
    return make(recipe, *without, f"store.path={recipe.parent}/top_k")


def view(store: Store) -> TaskView:
    return TaskView(store, "train", store.splits["train"].plan.task(0))


def found(store: Store) -> Distributions:
    task = view(store)
    return task.distributions(task.columns(np.arange(4)), np.arange(4), np.ones(4, np.int64))


def test_entropy_is_a_lower_bound_where_the_tail_is_unknown(whole: Store, top_k: Store) -> None:
    known, bound = found(whole), found(top_k)
    p = known.probabilities
    assert known.ids.shape == (4, V)
    assert known.entropy == pytest.approx(-(p * np.log(np.maximum(p, 1e-300))).sum(axis=1))
    np.testing.assert_allclose(bound.probabilities, p[:, :5], rtol=3e-2)
    tail = bound.tail(5)
    assert (bound.entropy < known.entropy + 1e-3).all()
    assert (known.entropy < bound.entropy + tail * np.log(V - 5) + 2e-2).all()


def test_a_sample_is_shown_with_its_task(
    whole: Store, top_k: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(store: Store, *more: str) -> str:
        assert main(["inspect", store.root, *more]) == 0
        return capsys.readouterr().out

    text = shown(whole, "--sample", "3", "--epoch", "1")
    for words in (
        "sample 3 of train (part 0, row 3), masking epoch 1, 16 tokens",
        "[MASK]",
        "  entropy  ",
        "task e001-p00000-0000 of train",
        "probability kept by top 5 at T = 2",
        "|hidden state|, input of the top 1 layer",
        "device cpu",
    ):
        assert words in text
    assert "  entropy, at least  " in shown(top_k, "--sample", "20")
    assert "sample 0 of validation" in shown(top_k, "--split", "validation")


def test_the_outputs_of_few_samples_are_read_for_the_statistics(
    whole: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task may hold gigabytes of them; tokens and masked tokens are those of the whole task."""
    assert main(["inspect", whole.root]) == 0
    all_samples = capsys.readouterr().out.splitlines()
    columns, read = TaskView.columns, []

    def counted(self: TaskView, rows: np.ndarray) -> Any:
        read.append(len(rows))
        return columns(self, rows)

    monkeypatch.setattr(TaskView, "columns", counted)
    monkeypatch.setattr(sample_view, "SAMPLES", 4)
    assert main(["inspect", whole.root]) == 0
    few = capsys.readouterr().out.splitlines()
    assert read == [1, 4]
    assert any(
        line.split() == ["samples", "for", "the", "next", "lines", "4,", "evenly", "spaced"] for line in few
    )

    def words(lines: list[str], name: str) -> list[str]:
        return next(line.split() for line in lines if line.startswith(name))

    for name in ("samples", "tokens", "bytes per token", "masked"):
        assert words(few, name) == words(all_samples, name)
    assert words(few, "largest logit") != words(all_samples, "largest logit")


def test_what_is_not_there_is_said(whole: Store) -> None:
    for more, words in (
        (["--sample", "999"], r"--sample 999 --epoch 0: .* has sequences 0 to \d+ and masking epochs 0 to 1"),
        (["--split", "validation", "--epoch", "1"], "masking epochs 0 to 0 of validation"),
        (["--split", "test"], "--split test: .* has train and validation"),
    ):
        with pytest.raises(UserError, match=words):
            main(["inspect", whole.root, *more])


@pytest.mark.parametrize(
    "overrides",
    [
        ["masking.probability=0"],
        ["store.positions=masked", "train.kl_positions=masked"],
        ["store.hidden_states=int8"],
        ["store.hidden_states=bfloat16", "store.top_k=0"],
    ],
)
def test_every_form_of_store_is_shown(
    recipe: Path, tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = make(recipe, f"store.path={tmp_path}/store", *overrides)
    plot = tmp_path / "kept.png"
    assert main(["inspect", store.root, "--sample", "1", "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "teacher's top 5" in text
    assert ("\nmasked " in text) == (store.layout.masked > 0)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("probabilities", [[[1.0]], [[1.0, 0.0]]])
def test_no_entropy_is_zero_without_a_sign(probabilities: list[list[float]]) -> None:
    made = Distributions(np.zeros((1, len(probabilities[0])), np.int64), np.array(probabilities))
    assert f"{made.entropy[0]:.2f}" == "0.00"


def test_no_probability_is_above_one(top_k: Store) -> None:
    """A stored logit that float16 rounded up can lie above the logsumexp."""
    task = view(top_k)
    columns = {name: array.copy() for name, array in task.columns(np.arange(4)).items()}
    columns["topk_logits"][..., 0] = columns["logsumexp"][..., 0] + 0.1
    columns["topk_logits"][..., 1:] = -1e4
    made = task.distributions(columns, np.arange(4), np.ones(4, np.int64))
    assert made.probabilities.max() == 1
    assert [f"{value:.2f}" for value in made.entropy] == ["0.00"] * 4


@pytest.mark.parametrize("kind", ["whole", "top_k"])
def test_the_plot_has_the_k_of_the_store(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, drawn = request.getfixturevalue(kind), []
    plot = Axes.plot

    def noted(axes: Axes, x: list[int], *rest: Any, **more: Any) -> Any:
        drawn.append(x)
        return plot(axes, x, *rest, **more)

    monkeypatch.setattr(Axes, "plot", noted)
    assert plot_kept_mass(view(store)).startswith(b"\x89PNG")
    assert drawn == [[1, 2, 4, 5, 8, 16, 32, 64] if kind == "whole" else [1, 2, 4, 5]]
