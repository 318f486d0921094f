"""A store with a tiny teacher's files, and a recipe of two students that names nothing but the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.files import storage
from infra.settings.recipe import Recipe
from infra.settings.sections import Evaluation, Store, Student, Tracking, Train, Variant
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.writer import begin_store, finish_store
from tests.evaluation.conftest import WORDS
from tests.store.synthetic import make_spec, small_layout, write_part, write_task


def save_store(root: Path | str, teacher: str, teacher_weights: bool = True) -> str:
    """A finished store of one part that holds the tokenizer, configuration and weights of ``teacher``."""
    layout = small_layout(vocab_size=len(WORDS), hidden_size=32, teacher_weights=teacher_weights)
    spec = make_spec(layout)
    begin_store(str(root), spec)
    for path in Path(teacher).iterdir():
        ours = path.name in ("config.json", "model.safetensors")
        target = storage.join(str(root), "teacher" if ours else "tokenizer", path.name)
        storage.publish_bytes(target, path.read_bytes())
    plan = SplitPlan.of("train", (4,), spec.plan)
    write_part(str(root), spec, plan, "train", 0)
    for task in plan.tasks():
        write_task(str(root), spec, "train", task)
    finish_store(str(root), {"train": 1})
    return str(root)


def family_recipe(directory: Path, store: str, **evaluation: Any) -> Recipe:
    """Students ``half`` and ``tiny`` of one store."""
    settings = {
        "tasks": ("SST-2",), "epochs": 1, "max_length": 16, "learning_rate": 3e-3,
        "elmo_reference": False, "latency_sentences": 8,
    }  # fmt: skip
    return Recipe(
        name="family",
        output=str(directory / "runs"),
        store=Store(path=store),
        students={
            "half": Variant(student=Student(), train=Train()),
            "tiny": Variant(
                student=Student(layers=(0,)),
                train=Train(alpha_ce=0.0, alpha_mlm=0.0, alpha_cos=0.0, alpha_relation=1.0),
            ),
        },
        evaluation=Evaluation(**{**settings, **evaluation}),
        tracking=Tracking(enabled=False),
    )
