"""Time of one replayed layer relative to the whole encoder, for BERT-base.

    python tests/benchmarks/bench_replay.py

prints the rows; ``run()`` returns them. The weights are random, the sequences have full length, the dtype is
the processor's fastest, and there is one thread. Three functions are timed in turn: the encoder's forward,
the replay of its top layer, and the query, key and value projections of this layer. The conditions of a row
give the ratio of multiplications too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.cpu.processor import computes_bfloat16
from offline_teacher.families import family_of
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import lower_part
from offline_teacher.models.weights import top_weights
from tests.benchmarks.results import Row, row
from tests.benchmarks.timing import interleave

BATCH, LENGTH, REPEATS = 16, 128, 9


def run() -> list[Row]:
    torch.set_num_threads(1)
    from transformers import BertConfig

    torch.manual_seed(0)
    config = BertConfig()
    dtype = torch.bfloat16 if computes_bfloat16() else torch.float32
    model = family_of(config).model_class(head=False)(config, add_pooling_layer=False).eval()
    replay = Replay(config, top_weights(model, 1), 1).to(dtype)
    encoder, below = lower_part(model, 0).to(dtype), lower_part(model, 1).to(dtype)
    ids = torch.randint(1000, config.vocab_size, (BATCH, LENGTH))
    with torch.inference_mode():
        stored = below(ids).half()
    sides: dict[str, Callable[[], object]] = {
        "encoder": torch.inference_mode()(lambda: encoder(ids)),
        "layer": lambda: replay.last_hidden(stored),
        "projections": lambda: replay.queries_keys_values(stored),
    }
    seconds = interleave(sides, REPEATS, "replay")
    where = (
        f"BERT-base with random weights, {BATCH} x {LENGTH}, {str(dtype).removeprefix('torch.')}, 1 thread,"
    )
    where += f" medians of {REPEATS} interleaved; "
    return [
        row(
            f"store.replay_over_encoder{suffix}",
            seconds[side] / seconds["encoder"],
            "ratio",
            goal,
            f"{where}{what}; by multiplications {count:.3f}",
        )
        for suffix, side, goal, what, count in (
            ("", "layer", "<= 0.12", "one whole layer", 1 / config.num_hidden_layers),
            ("_projections", "projections", None, "its queries, keys and values", _projected(config)),
        )
    ]


def _projected(config: Any) -> float:
    """Returns the multiplications of the three projections, divided by those of the encoder."""
    width = config.hidden_size
    layer = 4 * width**2 + 2 * width * config.intermediate_size + 2 * LENGTH * width
    return 3 * width**2 / (layer * config.num_hidden_layers)


if __name__ == "__main__":
    for measured in run():
        print(json.dumps(measured))
