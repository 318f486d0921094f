from __future__ import annotations

import numpy as np
import pytest

from evaluation.candidates.models import Candidate, load_model, load_tokenizer
from evaluation.devices import latency
from evaluation.sources.catalogue import find_task


def rows(count: int) -> list[dict[str, np.ndarray]]:
    return [{"input_ids": np.full((1, 2), row)} for row in range(count)]


def test_models_take_turns_in_rotating_order() -> None:
    calls: list[tuple[str, int]] = []
    runners = {
        name: lambda batch, name=name: calls.append((name, int(batch["input_ids"][0, 0])))
        for name in ("a", "b")
    }
    seconds = latency.interleave(runners, {"a": rows(5), "b": rows(5)}, block=2)
    timed = calls[2 * latency.WARMUP :]
    assert timed == [
        ("a", 0), ("a", 1), ("b", 0), ("b", 1),
        ("b", 2), ("b", 3), ("a", 2), ("a", 3),
        ("a", 4), ("b", 4),
    ]  # fmt: skip
    assert {name: len(values) for name, values in seconds.items()} == {"a": 5, "b": 5}


def test_numbers_come_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which sentence n takes n ms: the percentiles and the sum are known."""
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def run(batch: dict[str, np.ndarray]) -> None:
        now[0] += float(batch["input_ids"][0, 0]) / 1000

    inputs = {1: rows(101), 8: [{"input_ids": np.full((8, 2), 4)}, {"input_ids": np.full((2, 2), 4)}]}
    found = latency.measure({"m": run}, {"m": inputs}, threads=1)["m"]
    assert found.total_seconds == pytest.approx(5.05)
    assert (found.p50_ms, found.p95_ms, found.p99_ms) == pytest.approx((50, 95, 99))
    assert found.throughput == {8: pytest.approx(10 / 0.008)}


def test_a_real_model_gets_each_sentence_alone_and_batched(encoder: str) -> None:
    tokenizer = load_tokenizer(encoder)
    texts = [("the film is fine", "a day"), ("dull", "the film")]
    single, both = latency.batches(tokenizer, texts, 1, 16), latency.batches(tokenizer, texts, 2, 16)
    assert [batch["input_ids"].shape for batch in single] == [(1, 9), (1, 6)]
    runner = latency.torch_runner(load_model(Candidate("m", encoder), find_task("STS-B"), 0))
    alone = [np.asarray(runner(batch).detach()) for batch in single]  # type: ignore[attr-defined]
    together = np.asarray(runner(both[0]).detach())  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.concatenate(alone), together, atol=1e-5)


def test_threads_are_set_and_put_back() -> None:
    import torch

    seen: list[int] = []
    before = torch.get_num_threads()
    latency.measure(
        {"m": lambda batch: seen.append(torch.get_num_threads())}, {"m": {1: rows(2)}}, threads=before + 1
    )
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
