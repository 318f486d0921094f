"""Trains a student from a store.

    deepspeed --num_accelerators 2 student_train/main.py --recipe infra/recipes/demo.yaml
    torchrun --standalone --nproc_per_node 2 student_train/main.py --recipe infra/recipes/demo.yaml
    python student_train/main.py --recipe infra/recipes/demo.yaml train.learning_rate=1e-4

The same command resumes from the newest checkpoint, with any number of processes. It does nothing for a
finished student.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if not __package__:  # run as a file: the repository, not this directory, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infra import console
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.files import storage
from infra.files.locks import exclusive
from infra.files.paths import expand_home
from infra.settings.recipe import StudentRun
from infra.settings.recipe_file import load_recipe
from offline_teacher.store.reader import Store, open_store
from student_train.mirror import Mirror, mirrored
from student_train.ranks import end_process, rank_of_environment, share_cores

if TYPE_CHECKING:
    from student_train.engine.world import World


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="student_train/main.py", description="Train the students of a recipe from a store."
    )
    parser.add_argument("--recipe", required=True, type=expand_home, help="YAML file of the run")
    parser.add_argument("--student", metavar="NAME", help="train only this one of the recipe's students")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Trains the named student, or all that are not finished, one after the other."""
    share_cores()
    recipe = load_recipe(options.recipe, options.overrides)
    recipe.refuse_outputs_in_store()
    runs = recipe.runs() if options.student is None else {options.student: recipe.run(options.student)}
    store = open_store(recipe.store_path)
    stores = {name: [store, *_stores_of_phases(one)] for name, one in runs.items()}
    left = [one for one in runs.values() if not _is_finished(one, stores[one.name])]
    if not left:
        return 0
    from student_train.engine.world import start_world

    world = start_world()
    try:
        _check(left, stores, world)
        code = _train_all(left, stores, world, alone=len(runs) == 1)
        world.wait()
        return code
    except UserError as problem:
        if world.size == 1:
            raise
        # A launcher ends all ranks as soon as one has failed, so no rank exits before rank 0 has printed the
        # error.
        if world.first:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        world.wait()
        return problem.exit_code
    finally:
        world.close()


def _stores_of_phases(run: StudentRun) -> list[Store]:
    return [open_store(expand_home(phase.store)) for phase in run.train.phases]


def _is_finished(run: StudentRun, stores: list[Store]) -> bool:
    """Prints a line if the student is finished. Raises UserError if it was trained with other settings."""
    from student_train.student.published import finished, require_same

    with mirrored(run.directory, run.train.cache_dir) as mirror:
        done = finished(mirror.local if mirror else run.directory)
    if done is None:
        return False
    require_same(done["fingerprint"], _fingerprint(run, stores), run.directory)
    if rank_of_environment() == 0:
        _say(run, done["results"], "complete, nothing to do")
    return True


def _fingerprint(run: StudentRun, stores: list[Store]) -> dict[str, Any]:
    phases = {
        str(number): {"store": store.digest, "steps": phase.steps}
        for number, (store, phase) in enumerate(zip(stores[1:], run.train.phases, strict=True), 1)
    }
    told = {"recipe": run.outcome_settings(), "store": stores[0].digest}
    return {**told, "phases": phases} if phases else told


def _check(runs: list[StudentRun], stores: Mapping[str, list[Store]], world: World) -> None:
    """Raises UserError, before any training, if a student of the recipe is impossible."""
    from offline_teacher.stored_teacher import stored_config, teacher_of
    from student_train.data.order import check_world
    from student_train.engine.deepspeed_config import build_config
    from student_train.objectives.needs import check_phases, check_store
    from student_train.student.model import architecture

    for run in runs:
        store = stores[run.name][0]
        config = stored_config(store)
        try:
            for one in stores[run.name]:
                samples = one.splits["train"].plan.samples_per_epoch
                check_world(
                    run.train.batch_size, world.size, samples, "the store" if one is store else one.root
                )
            check_store(run.train, store)
            check_phases(run.train, stores[run.name])
            build_config(run.train, world.size)
            with teacher_of(store):
                architecture(run.student, run.train, config, store.layout.teacher_weights)
        except UserError as problem:
            raise UserError(f"student {run.name}: {problem}" if len(runs) > 1 else str(problem)) from None


def _train_all(runs: list[StudentRun], stores: Mapping[str, list[Store]], world: World, alone: bool) -> int:
    """0, or EXIT_INCOMPLETE if a student failed. With ``alone``, its error is raised instead."""
    failed = []
    for run in runs:
        try:
            results = _train_one(run, stores[run.name], world)
        except UserError as problem:
            if alone:
                raise
            failed.append(run.name)
            if world.first:
                print(f"error: student {run.name}: {problem}", file=sys.stderr, flush=True)
            continue
        if world.first:
            _say(run, results, "trained")
    if failed and world.first:
        others = "; the others are finished" if len(failed) < len(runs) else ""
        print(f"error: not trained: {', '.join(failed)}{others}", file=sys.stderr, flush=True)
    return EXIT_INCOMPLETE if failed else 0


def _train_one(run: StudentRun, stores: list[Store], world: World) -> dict[str, Any]:
    with contextlib.ExitStack() as held:
        mirror = world.all_do(lambda: held.enter_context(mirrored(run.directory, run.train.cache_dir)))
        held.enter_context(_only_trainer(mirror.local if mirror else run.directory, world))
        return _train(run, stores, world, mirror)


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


def _train(run: StudentRun, stores: list[Store], world: World, mirror: Mirror | None) -> dict[str, Any]:
    """Trains, publishes, registers; what the model card and the last table say."""
    store = stores[0]
    import transformers

    from infra.cpu.processor import warn_if_slow
    from infra.tracking import run as tracking
    from student_train.engine.engine import Engine
    from student_train.gauges import deterministic
    from student_train.objectives.needs import soft_target_kind, taught_layout
    from student_train.student.published import publish_model
    from student_train.student.reach import frozen_parameters
    from student_train.trainer import Trainer

    transformers.logging.disable_progress_bar()
    if world.first and world.device.type == "cpu":
        warn_if_slow("train.dtype", run.train.dtype)
    directory = mirror.local if mirror else run.directory
    world.first_does(lambda: _save_recipe(run, directory))
    model, objective = world.all_do(lambda: model_and_objective(run, store, world))
    frozen = frozen_parameters(model)  # before they are rounded to train.dtype
    fingerprint = _fingerprint(run, stores)
    with (
        deterministic(run.train.deterministic),
        tracking.start_run(run.recipe, "student", world.rank, run.name) as tracked,
    ):
        tracked.log_store(run.recipe.store_path, store.digest)
        engine = world.all_do(lambda: Engine(model, run.train, world))
        trainer = Trainer(run, world, stores, model, objective, engine, tracked, fingerprint, mirror)
        validated = trainer.train()
        results = {
            "steps": trainer.total_steps,
            "soft_targets": soft_target_kind(run.train, taught_layout(run.train, store.layout)),
            "training": trainer.history.last_losses(),
            "validation": validated,
        }
        weights = {**engine.gather()["weights"], **frozen}

        def publish() -> str:
            path = publish_model(run, directory, model, weights, stores, fingerprint, results)
            if mirror:
                mirror.push()
            tracked.register_model(path, run.registered_name, tags={"store": store.digest})
            return path

        world.first_does(publish)
    return results


def _save_recipe(run: StudentRun, directory: str) -> str:
    run.recipe.save(directory)
    return directory


def model_and_objective(run: StudentRun, store: Store, world: World) -> tuple[Any, Any]:
    """The student, with parameters frozen that no loss term reaches, and the loss against the store's
    teacher."""
    import torch

    from infra.files.cache import Cache
    from offline_teacher.models.replay import Replay
    from offline_teacher.models.split import lower_of
    from offline_teacher.stored_teacher import stored_config, stored_pooling, stored_weights, teacher_of
    from student_train.objectives.needs import taught_layout
    from student_train.objectives.objective import Objective
    from student_train.student.model import build_student
    from student_train.student.reach import freeze_unreached

    train, config, layout = run.train, stored_config(store), taught_layout(run.train, store.layout)
    cache = Cache(train.cache_dir, train.cache_bytes) if storage.is_remote(store.root) else None
    weights = stored_weights(store, config, cache, complete=store.layout.teacher_weights)
    pooling = stored_pooling(store) if train.alpha_embedding else None
    with teacher_of(store):
        model = build_student(
            run.student, train, config, weights if layout.teacher_weights else None, pooling
        )
        replay = Replay(config, weights, layout.replay_layers) if layout.hidden_states != "none" else None
        live = lower_of(config, weights, layout.replay_layers) if train.teacher == "live" else None
        objective = Objective(train, layout, replay, live, pooling)
        model.flops_per_token = freeze_unreached(model, objective)
    for part in (replay, live):
        if part is not None:
            part.to(world.device, getattr(torch, train.dtype))
    return model, objective


def _say(run: StudentRun, results: dict[str, Any], what: str) -> None:
    rows = [("steps", f"{results['steps']:,}"), ("soft targets", results["soft_targets"] or "none")]
    rows += [(name, f"{value:.5g}") for name, value in results["training"].items()]
    rows += [(f"validation {name}", f"{value:.5g}") for name, value in results["validation"].items()]
    print(
        f"\nstudent {run.recipe.name}/{run.name}: {what}\n{console.table(rows, ['measure', 'value'])}\n"
        f"{run.directory}/model"
    )


def main(arguments: list[str] | None = None) -> NoReturn:
    """Only rank 0 prints errors.

    Before the ranks have met, the others end quietly with 0, so that the launcher waits for rank 0; later all
    end with one exit code.
    """
    if rank_of_environment() == 0:
        console.command(lambda: run(parse(arguments)))
    with contextlib.suppress(UserError, KeyboardInterrupt):
        sys.exit(run(parse(arguments)))
    sys.exit(0)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        end_process(int(ended.code or 0))
