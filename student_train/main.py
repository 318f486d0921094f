"""Trains a student from a store.

    deepspeed --num_accelerators 2 student_train/main.py --recipe infra/recipes/demo.yaml
    torchrun --standalone --nproc_per_node 2 student_train/main.py --recipe infra/recipes/demo.yaml
    python student_train/main.py --recipe infra/recipes/demo.yaml train.learning_rate=1e-4

Run again, it goes on from the newest checkpoint, with any number of processes; a finished student is left
alone.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if not __package__:  # run as a file: the repository, not this directory, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infra import console, storage
from infra.errors import UserError
from infra.locks import exclusive
from infra.paths import expand_home
from infra.recipe import Recipe, load_recipe
from offline_teacher.store.manifest import RECIPE_NAME, RECIPE_SIDECAR_NAME, repair_command
from offline_teacher.store.reader import Store, open_store
from offline_teacher.store.verify import check_recipe
from student_train.mirror import Mirror, mirrored
from student_train.model_card import finished, require_same
from student_train.ranks import rank_of_environment, share_cores

if TYPE_CHECKING:
    from student_train.engine import World


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="student_train/main.py", description="Train a student from a store."
    )
    parser.add_argument("--recipe", required=True, type=expand_home, help="YAML file of the run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    share_cores()
    recipe = load_recipe(options.recipe, options.overrides)
    _check_own_recipe(options.recipe)
    with mirrored(recipe.student_dir, recipe.train.cache_dir) as mirror:
        return _run(recipe, mirror)


def _check_own_recipe(path: str) -> None:
    """UserError where the recipe is a store's own, and damaged."""
    root, _, name = path.rpartition("/")
    sealed = name == RECIPE_NAME and storage.exists(storage.join(root or ".", RECIPE_SIDECAR_NAME))
    for problem in check_recipe(root or ".") if sealed else ():
        raise UserError(f"{path}: {problem}: run `{repair_command(root)}`, or use the recipe it was made of")


def _run(recipe: Recipe, mirror: Mirror | None) -> int:
    directory = mirror.local if mirror else recipe.student_dir
    store = open_store(recipe.store_dir)
    fingerprint = {"recipe": recipe.outcome("student", "train"), "store": store.manifest.digest}
    done = finished(directory)
    if done is not None:
        require_same(done["fingerprint"], fingerprint, recipe.student_dir)
        if rank_of_environment() == 0:
            _say(recipe, done["results"], "complete, nothing to do")
        return 0
    from student_train.engine import start_world

    world = start_world()
    try:
        with _only_trainer(directory, world):
            results = _train(recipe, store, fingerprint, world, mirror)
        if world.first:
            _say(recipe, results, "trained")
    finally:
        world.close()
    return 0


@contextlib.contextmanager
def _only_trainer(directory: str, world: World) -> Iterator[None]:
    """Holds a lock that ends with this process: ranks that outlive a killed launcher still write here."""
    with contextlib.ExitStack() as held:

        def lock() -> str:
            held.enter_context(exclusive(directory))
            storage.require_writable(directory)
            return directory

        world.first_does(lock)
        yield


def _train(
    recipe: Recipe, store: Store, fingerprint: dict[str, Any], world: World, mirror: Mirror | None
) -> dict[str, Any]:
    """Trains, publishes, registers; what the model card and the last table say."""
    import transformers

    from infra import tracking
    from infra.processor import warn_if_slow
    from student_train.engine import Engine
    from student_train.model_card import publish_model
    from student_train.objective import soft_target_kind
    from student_train.order import check_world
    from student_train.trainer import Trainer

    transformers.logging.disable_progress_bar()
    check_world(recipe.train.batch_size, world.size, store.plan.sequences)
    if world.first and world.device.type == "cpu":
        warn_if_slow("train.dtype", recipe.train.dtype)
    directory = mirror.local if mirror else recipe.student_dir
    world.first_does(lambda: _save_recipe(recipe, directory))
    validation = _validation_store(recipe, store)
    kind = soft_target_kind(recipe.train, store.layout)
    model, objective = world.all_do(lambda: _model_and_objective(recipe, directory, store, world, kind))
    with tracking.start_run(recipe, "student", world.rank) as tracked:
        tracked.log_store(recipe.store_dir, store.manifest.digest)
        engine = world.all_do(lambda: Engine(model, recipe.train, world))
        trainer = Trainer(
            recipe, world, store, validation, model, objective, engine, tracked, fingerprint, mirror
        )
        validated = trainer.train()
        results = {
            "steps": trainer.total_steps,
            "soft_targets": kind,
            "training": trainer.last_logged(),
            "validation": validated,
        }
        weights = engine.gather()["weights"]

        def publish() -> str:
            path = publish_model(recipe, directory, model, weights, store, fingerprint, results)
            if mirror:
                mirror.push()
            name = recipe.tracking.model_name or recipe.name
            tracked.register_model(path, name, tags={"store": store.manifest.digest})
            return path

        world.first_does(publish)
    return results


def _save_recipe(recipe: Recipe, directory: str) -> str:
    recipe.save(directory)
    return directory


def _model_and_objective(
    recipe: Recipe, directory: str, store: Store, world: World, kind: str | None
) -> tuple[Any, Any]:
    import dataclasses

    import torch

    from student_train.checkpoint import newest_step
    from student_train.objective import Objective
    from student_train.soft_targets import TeacherHead
    from student_train.student import build_student

    student = recipe.student
    if newest_step(storage.join(directory, "checkpoints")) is not None:
        student = dataclasses.replace(student, init="random")  # the weights come from the checkpoint
    config = store.teacher_config()
    if config.get("vocab_size") != store.layout.vocab_size:
        raise UserError(
            f"{recipe.store_dir}: its teacher has a vocabulary of {config.get('vocab_size')}, its samples "
            f"one of {store.layout.vocab_size}; it is not one store, run the teacher again"
        )
    teacher = recipe.teacher
    model = build_student(student, config, teacher.model, revision=teacher.revision, seed=recipe.train.seed)
    head = None
    if store.layout.hidden_states != "none":
        dtype = getattr(torch, recipe.train.dtype)
        head = TeacherHead.from_store(store.head()).to(world.device, dtype)
    return model, Objective(recipe.train, store.layout, head)


def _validation_store(recipe: Recipe, store: Store) -> Store | None:
    """The held-out store, where there is one. UserError where it is of another teacher."""
    if not storage.exists(storage.join(recipe.validation_store_dir, "manifest.json")):
        if recipe.corpus.validation_path or recipe.corpus.validation_split:
            raise UserError(
                f"{recipe.validation_store_dir}: the recipe names held-out text, but there is no complete "
                "store of it; run the teacher: python -m offline_teacher.main run --recipe RECIPE"
            )
        return None
    validation = open_store(recipe.validation_store_dir)
    for part in ("teacher", "tokenizer"):
        mine, other = store.manifest.fingerprint.get(part), validation.manifest.fingerprint.get(part)
        if mine != other:
            raise UserError(
                f"{recipe.validation_store_dir}: its {part} ({other}) is not the training store's ({mine}); "
                "remove it and run the teacher again"
            )
    return validation


def _say(recipe: Recipe, results: dict[str, Any], what: str) -> None:
    rows = [("steps", f"{results['steps']:,}"), ("soft targets", results["soft_targets"] or "none")]
    rows += [(name, f"{value:.5g}") for name, value in results["training"].items()]
    rows += [(f"validation {name}", f"{value:.5g}") for name, value in results["validation"].items()]
    print(
        f"\nstudent {recipe.name}: {what}\n{console.table(rows, ['measure', 'value'])}\n"
        f"{recipe.student_dir}/model"
    )


def main(arguments: list[str] | None = None) -> NoReturn:
    """Rank 0 speaks for all: the others end quietly, with 0, so that the launcher waits for its exit code."""
    if rank_of_environment() == 0:
        console.command(lambda: run(parse(arguments)))
    with contextlib.suppress(UserError, KeyboardInterrupt):
        run(parse(arguments))
    sys.exit(0)


if __name__ == "__main__":
    main()
