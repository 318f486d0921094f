"""Compares student and teacher on held-out text, by every measure of the trainer's validation.

    python -m tests.benchmarks.compare.measures --recipe RECIPE --model DIR --store STORE --output FILE
    python -m tests.benchmarks.compare.measures --recipe RECIPE --save DIR

``--recipe`` has the student's architecture. The measures are the same for every training loss: the relation
loss, the cosine and, for a student with a masked-LM head, KL at T = 1 and 2, masked-LM loss and agreement. A
narrower student has no cosine, because its directory lacks the projection to the teacher's hidden size.
``--save`` writes the student's initial weights as a model directory.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForMaskedLM

from infra.files import storage
from infra.settings.recipe import StudentRun
from infra.settings.recipe_file import load_recipe
from offline_teacher.store.store import Store, open_store
from student_train.engine.world import World
from student_train.objectives.validation import validate
from student_train.student_and_loss import model_and_objective

ALL: dict[str, Any] = {
    "alpha_ce": 5.0,
    "alpha_mlm": 2.0,
    "alpha_cos": 1.0,
    "alpha_relation": 1.0,
    "soft_targets": "auto",
}
WITHOUT_HEAD: dict[str, Any] = {"alpha_ce": 0.0, "alpha_mlm": 0.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--model")
    parser.add_argument("--store")
    parser.add_argument("--output")
    parser.add_argument("--save")
    options = parser.parse_args()
    run = load_recipe(options.recipe).run("student")
    if options.save:
        save_start(run, open_store(run.recipe.store_path), options.save)
    else:
        storage.publish_json(options.output, measures(run, open_store(options.store), options.model))
    return 0


def measures(run: StudentRun, store: Store, directory: str) -> dict[str, float]:
    """Returns measure -> value of the model in ``directory``, computed in the student's training dtype."""
    head = "ForMaskedLM" in storage.read_json(f"{directory}/config.json")["architectures"][0]
    weights = {**ALL, **({} if head else WITHOUT_HEAD)}
    if run.student.hidden_size is not None:
        weights["alpha_cos"] = 0.0
    train = replace(run.train, teacher="store", **weights)
    model, objective, world = _student(replace(run, train=train), store)
    model_class: Any = AutoModelForMaskedLM if head else AutoModel
    trained = model_class.from_pretrained(directory, dtype=torch.float32)
    model.model.load_state_dict(trained.state_dict())
    return validate(model.to(getattr(torch, train.dtype)), objective, store, world, train)


def save_start(run: StudentRun, store: Store, directory: str) -> None:
    """Saves the student before its first step as a model directory."""
    model, _, _ = _student(run, store)
    model.save(directory)
    for name, data in store.tokenizer_files().items():
        storage.publish_bytes(str(Path(directory, name)), data)


def _student(run: StudentRun, store: Store) -> tuple[Any, Any, World]:
    world = World(0, 1, torch.device("cpu"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return *model_and_objective(run, store, world), world


if __name__ == "__main__":
    sys.exit(main())
