"""The teacher pass against the bare forward, the bare encoder, and the script one would write instead.

``python tests/benchmarks/bench_teacher.py [MODEL_DIRECTORY]`` prints the rows; ``run()`` returns them.
Without a directory: BERT-base, random weights. Same batches on all sides, full sequences, one thread,
interleaved repeats in one process, medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.sections import Teacher
from offline_teacher.store.manifest import Declaration
from offline_teacher.store.schema import FORMAT_VERSION, Layout, ShardPlan, SpecialIds
from offline_teacher.store.writer import begin_store, write_shard
from offline_teacher.teacher import Capture, LoadedTeacher, load_teacher

L, BATCH, BATCHES, REPEATS, M = 128, 16, 4, 5, 19


def run(model: str | None = None) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        directory = model or _bert_base(Path(scratch, "model"))
        return _measure(directory, Path(scratch), "shared teacher" if model else "BERT-base, random weights")


def _bert_base(directory: Path) -> str:
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {name: i for i, name in enumerate([*names, *(f"w{i}" for i in range(30_522 - len(names)))])}
    special = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True)
    )
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig()).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(directory)
    return str(directory)


def _measure(directory: str, scratch: Path, model: str) -> list[dict[str, Any]]:
    from transformers import AutoModelForMaskedLM

    loaded = load_teacher(Teacher(model=directory), "cpu", L)
    bare = AutoModelForMaskedLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    plain = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(1_000, 30_000, (BATCH * BATCHES, L)).astype(np.uint16)
    batches = torch.from_numpy(ids.astype(np.int64)).split(BATCH)

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            bare(input_ids=batch).logits  # noqa: B018

    @torch.inference_mode()
    def encoder() -> None:
        for batch in batches:
            loaded.model(input_ids=batch)

    @torch.inference_mode()
    def script() -> None:
        kept = []
        for batch in batches:
            out = plain(input_ids=batch, attention_mask=torch.ones_like(batch), output_hidden_states=True)
            kept.append((*out.logits.topk(64), out.hidden_states[-1]))
        torch.save(kept, scratch / "kept.pt")

    sides: dict[str, Callable[[], None]] = {
        "capture": _capture(loaded, ids, scratch / "full", 64),
        "forward": forward,
        "hidden_only": _capture(loaded, ids, scratch / "hidden", 0),
        "encoder": encoder,
        "script": script,
    }
    rate = _rates(sides)
    told = ", ".join(f"{name} {value:,.0f}" for name, value in rate.items())
    where = f"{model}, {BATCH} x {L}, bfloat16, 1 thread, medians of {REPEATS} interleaved, tokens/s: {told}"
    return [
        _row("teacher.capture_over_bare_forward", rate["capture"] / rate["forward"], 0.90, where),
        _row("teacher.hidden_only_over_encoder", rate["hidden_only"] / rate["encoder"], 0.95, where),
        _row("teacher.over_plain_script", rate["capture"] / rate["script"], 4.0, where),
    ]


def _capture(loaded: LoadedTeacher, ids: np.ndarray, root: Path, top_k: int) -> Callable[[], None]:
    """One shard of all batches, written to disk as a pass writes it."""
    V, D = loaded.head.decoder_weight.shape  # noqa: N806
    layout = Layout(
        length=L,
        masked=M,
        vocab_size=V,
        top_k=top_k,
        temperatures=(1.0, 2.0),
        hidden_size=D,
        hidden_states="float16",
        positions="all",
    )
    tokenizer = loaded.tokenizer
    special = SpecialIds(
        pad=tokenizer.pad_token_id,
        mask=tokenizer.mask_token_id,
        cls=tokenizer.cls_token_id,
        sep=tokenizer.sep_token_id,
    )
    declaration = Declaration(layout, ShardPlan(len(ids), 1, len(ids)), special, {"format": FORMAT_VERSION})
    begin_store(str(root), declaration)
    capture = Capture(loaded, layout)
    count = np.full(len(ids), L, np.uint16)
    positions = np.tile(np.arange(1, M + 1, dtype=np.int16), (len(ids), 1))
    fixed = {
        "sequence_id": np.arange(len(ids)),
        "token_count": count,
        "input_ids": ids,
        "masked_positions": positions,
        "masked_labels": ids[:, 1 : M + 1],
    }

    def pass_() -> None:
        parts = [
            capture.batch(ids[rows], count[rows], positions[rows])
            for rows in np.split(np.arange(len(ids)), BATCHES)
        ]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        write_shard(str(root), declaration, 0, 0, {**fixed, **columns})

    return pass_


def _rates(sides: dict[str, Callable[[], None]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            if repeat:  # the first warms up
                times[name].append(time.perf_counter() - begin)
    return {name: BATCH * BATCHES * L / statistics.median(seconds) for name, seconds in times.items()}


def _row(name: str, value: float, goal: float, conditions: str) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "unit": "ratio",
        "goal": f">= {goal:g}",
        "holds": value >= goal,
        "conditions": conditions,
    }


if __name__ == "__main__":
    for row in run(*sys.argv[1:2]):
        print(json.dumps(row))
