"""Runs ``Engine`` jobs on a toy model. test_engine.py calls ``run``, or starts this module once for each
rank; then rank 0 prints JSON.

A job: {"name", "stage", "dtype", "from": checkpoint directory or null, "first", "last", "save_at", "to"}.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

from infra.settings.sections import Train
from student_train.engine import checkpoint_format
from student_train.engine.engine import Engine
from student_train.engine.world import World, start_world
from student_train.ranks import end_process

BATCH, VOCABULARY, WIDTH = 8, 23, 7


class Toy(nn.Module):
    """A model with embeddings tied to the output, two layers with biases, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"words": nn.Embedding(VOCABULARY, WIDTH)})
        self.layer = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        words = self.embeddings["words"]
        hidden = words(ids)
        for layer in self.layer:
            hidden = torch.tanh(layer(hidden))
        logits = (self.norm(hidden) @ words.weight.T).float()
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / BATCH


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def data(step: int) -> torch.Tensor:
    """Returns ids and labels of the global batch of a step, int64 [2, BATCH]."""
    return torch.randint(0, VOCABULARY, (2, BATCH), generator=torch.Generator().manual_seed(step))


def restore(engine: Engine, directory: str, world: World) -> None:
    """Resumes from the newest checkpoint in the directory, as the trainer does."""
    found = checkpoint_format.load_newest(directory) if world.is_rank_0 else None

    def facts() -> str:
        assert found is not None
        return json.dumps([found.run_state.optimizer_step, found.run_state.loss_scaler])

    optimizer_step, loss_scaler = json.loads(world.on_rank_0(facts))
    engine.restore(found.tensors if found else None, optimizer_step)
    engine.restore_scaler(loss_scaler)


def run(job: dict, world: World) -> dict:
    train = Train(
        batch_size=BATCH,
        micro_batch_size=2,
        dtype=job["dtype"],
        zero_stage=job["stage"],
        max_grad_norm=0.5,
        layer_decay=job.get("layer_decay", 1.0),
        deepspeed_config=job.get("config"),
    )
    model = toy()
    engine = Engine(model, train, world)
    if job.get("from"):
        restore(engine, job["from"], world)
    losses, norms = [], []
    for step in range(job["first"], job["last"]):
        ids, labels = data(step).chunk(world.size, dim=1)[world.rank]
        total = 0.0
        micro = list(zip(ids.split(2), labels.split(2), strict=True))
        for number, (x, y) in enumerate(micro):
            loss = model.loss(x, y)
            engine.backward(loss, number == len(micro) - 1)
            total += float(loss.detach())
        norm = engine.step(1e-2)
        losses.append(world.sum([total])[0])
        norms.append(float(norm))
        if job.get("save_at") == step + 1:
            state = engine.gather()
            facts = checkpoint_format.RunState(
                step=step + 1,
                samples_seen=0,
                optimizer_step=engine.optimizer_step(),
                loss_scaler=engine.scaler_state(),
                samples_digest="",
                fingerprint={},
                tracking_run=None,
            )
            world.on_rank_0(partial(checkpoint_format.save, job["to"], facts, state, 2))
    weights = engine.gather()["weights"]
    return {
        "losses": losses,
        "norms": norms,
        "weights": {name: tensor.flatten().tolist() for name, tensor in weights.items()},
        "applied": engine.optimizer_step(),
    }


def adapt_deepspeed(patch: pytest.MonkeyPatch) -> None:
    """Lets every CPU compute float16, which torch does slowly. DeepSpeed no longer reports its use of memory,
    because each report collects garbage, which takes longer than the job."""
    from deepspeed.accelerator import get_accelerator

    patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    patch.setattr("deepspeed.runtime.bf16_optimizer.see_memory_usage", lambda *_, **__: None)


def main() -> None:
    world = start_world()
    adapt_deepspeed(pytest.MonkeyPatch())
    results = {job["name"]: run(job, world) for job in json.loads(sys.argv[1])}
    if world.is_rank_0:
        print("RESULT" + json.dumps(results))
    world.close()
    end_process(0)


if __name__ == "__main__":
    main()
