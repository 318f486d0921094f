"""``inspect``: what it says of distributions that are known whole, or only in part."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes

from offline_teacher.sample_view import Distributions, _kept_mass, _sample, distributions
from offline_teacher.store.reader import Store
from tests.store.synthetic import make_store, small_layout

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with hidden states and, of all 40 tokens, the top 5."""
    return make_store(str(tmp_path_factory.mktemp("view") / "whole"), small_layout(top_k=5))


@pytest.fixture(scope="module")
def top_k(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same without the hidden states."""
    layout = small_layout(top_k=5, hidden_states="none")
    return make_store(str(tmp_path_factory.mktemp("view") / "top_k"), layout)


class Tokenizer:
    def id_to_token(self, number: int) -> str:
        return f"t{number}"

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return " ".join(map(self.id_to_token, ids))


def found(store: Store) -> Distributions:
    head = store.head() if store.layout.hidden_states != "none" else None
    rows = np.arange(4)
    return distributions(store, store.shard(0, 0), head, rows, np.zeros(4, np.int64))


def test_entropy_is_a_lower_bound_where_the_tail_is_unknown(whole: Store, top_k: Store) -> None:
    known, bound = found(whole), found(top_k)
    p = known.probabilities
    assert known.entropy == pytest.approx(-(p * np.log(p)).sum(axis=1))
    np.testing.assert_allclose(bound.probabilities, p[:, :5], rtol=1e-2)
    tail = bound.tail(5)
    assert (bound.entropy < known.entropy).all()
    assert (known.entropy < bound.entropy + tail * np.log(40 - 5) + 1e-2).all()


def test_entropy_is_headed_by_what_it_is(whole: Store, top_k: Store) -> None:
    assert "  entropy  " in _sample(whole, whole.shard(0, 0), whole.head(), 0, Tokenizer())
    assert "  entropy, at least  " in _sample(top_k, top_k.shard(0, 0), None, 0, Tokenizer())


@pytest.mark.parametrize("probabilities", [[[1.0]], [[1.0, 0.0]]])
def test_no_entropy_is_zero_without_a_sign(probabilities: list[list[float]]) -> None:
    made = Distributions(np.zeros((1, len(probabilities[0])), np.int64), np.array(probabilities))
    assert f"{made.entropy[0]:.2f}" == "0.00"


def test_no_probability_is_above_one(top_k: Store) -> None:
    """A stored logit that float16 rounded up can lie above the logsumexp."""
    shard = top_k.shard(0, 0)
    columns = {name: array.copy() for name, array in shard.columns.items()}
    columns["topk_logits"][..., 0] = columns["logsumexp"][..., 0] + 0.01
    columns["topk_logits"][..., 1:] = -1e4
    rounded = type(shard)(shard.replica, shard.index, columns)
    made = distributions(top_k, rounded, None, np.arange(4), np.zeros(4, np.int64))
    assert made.probabilities.max() == 1
    assert [f"{value:.2f}" for value in made.entropy] == ["0.00"] * 4


@pytest.mark.parametrize("kind", ["whole", "top_k"])
def test_the_plot_has_the_k_of_the_store(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, drawn = request.getfixturevalue(kind), []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, x, *rest, **more: drawn.append(x) or plot(axes, x, *rest, **more)
    )
    head = store.head() if kind == "whole" else None
    assert _kept_mass(store, store.shard(0, 0), head).startswith(b"\x89PNG")
    assert drawn == [[1, 2, 4, 5, 8, 16, 32] if kind == "whole" else [1, 2, 4, 5]]
