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
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if not __package__:  # run as a file: imports start at the repository, not at this directory
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infra import console
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.files import storage
from infra.files.locks import exclusive
from infra.files.paths import expand_home
from infra.settings.recipe import StudentRun
from infra.settings.recipe_file import load_recipe
from offline_teacher.store.store import Store, open_store
from student_train.mirror import Mirror, mirrored
from student_train.ranks import end_process, rank_of_environment, share_cores

if TYPE_CHECKING:
    from student_train.engine.world import World

WAIT_SECONDS = 30.0
"""Seconds after which a rank other than 0 prints an error that occurred before the ranks were connected."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="student_train/main.py", description="Train the students of a recipe from a store."
    )
    parser.add_argument("--recipe", required=True, type=expand_home, help="YAML file of the run")
    parser.add_argument("--student", metavar="NAME", help="train only the student of this name")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Trains the student ``options.student``, or all unfinished students. Returns the exit code."""
    share_cores()
    recipe = load_recipe(options.recipe, options.overrides)
    recipe.refuse_outputs_in_store()
    runs = recipe.runs() if options.student is None else {options.student: recipe.run(options.student)}
    store = open_store(recipe.store_path)
    stores = {}
    for name, student in runs.items():
        stores[name] = [store, *(open_store(expand_home(phase.store)) for phase in student.train.phases)]
    unfinished = [student for student in runs.values() if not _is_finished(student, stores[student.name])]
    if not unfinished:
        return 0
    from student_train.engine.world import start_world

    world = start_world()
    try:
        world.on_all_ranks(lambda: _check(unfinished, stores, world))
        code = _train_all(unfinished, stores, world, single=len(runs) == 1)
        world.barrier()
        return code
    except UserError as problem:
        if world.size == 1:
            raise
        # A launcher ends all ranks as soon as one has failed, so no rank exits before rank 0 has printed the
        # error.
        if world.is_rank_0:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        world.barrier()
        return problem.exit_code
    finally:
        world.close()


def _is_finished(run: StudentRun, stores: list[Store]) -> bool:
    """Returns whether the student is finished, and if so prints its results. Raises UserError if a finished
    student was trained with other settings."""
    from student_train.student.model_directory import finished_record, require_same

    with mirrored(run.directory, run.train.cache_dir) as mirror:
        record = finished_record(mirror.local if mirror else run.directory)
    if record is None:
        return False
    require_same(record["fingerprint"], _fingerprint(run, stores), run.directory)
    if rank_of_environment() == 0:
        _print_results(run, record["results"], "complete, nothing to do")
    return True


def _fingerprint(run: StudentRun, stores: list[Store]) -> dict[str, Any]:
    """Returns what affects the trained student: settings of the recipe, and digests of stores."""
    phases = {
        str(number): {"store": store.digest, "steps": phase.steps}
        for number, (store, phase) in enumerate(zip(stores[1:], run.train.phases, strict=True), 1)
    }
    fingerprint = {"recipe": run.fingerprinted_settings(), "store": stores[0].digest}
    return {**fingerprint, "phases": phases} if phases else fingerprint


def _check(runs: list[StudentRun], stores: Mapping[str, list[Store]], world: World) -> None:
    """Raises UserError, before any training, if a student cannot be trained on these ranks."""
    from offline_teacher.inputs.stored_teacher import stored_config, teacher_of
    from student_train.data.loss_needs import check_phases, check_store
    from student_train.data.order import check_world
    from student_train.engine.deepspeed_config import build_config
    from student_train.student.model import architecture

    for run in runs:
        store = stores[run.name][0]
        config = stored_config(store)
        try:
            for each in stores[run.name]:
                samples = each.splits["train"].plan.samples_per_epoch
                name = "the store" if each is store else each.root
                check_world(run.train.batch_size, world.size, samples, name)
            check_store(run.train, store)
            check_phases(run.train, stores[run.name])
            build_config(run.train, world.size)
            with teacher_of(store):
                architecture(run.student, run.train, config, store.layout.teacher_weights)
        except UserError as problem:
            raise UserError(f"student {run.name}: {problem}" if len(runs) > 1 else str(problem)) from None


def _train_all(runs: list[StudentRun], stores: Mapping[str, list[Store]], world: World, single: bool) -> int:
    """Trains students. Returns 0, or EXIT_INCOMPLETE if a student failed. ``single``: the command is for a
    single student, so its UserError is raised instead."""
    failed = []
    for run in runs:
        try:
            results = _train_one(run, stores[run.name], world)
        except UserError as problem:
            if single:
                raise
            failed.append(run.name)
            if world.is_rank_0:
                print(f"error: student {run.name}: {problem}", file=sys.stderr, flush=True)
            continue
        if world.is_rank_0:
            _print_results(run, results, "trained")
    if failed and world.is_rank_0:
        others = "; the other students are finished" if len(failed) < len(runs) else ""
        print(f"error: not trained: {', '.join(failed)}{others}", file=sys.stderr, flush=True)
    return EXIT_INCOMPLETE if failed else 0


def _train_one(run: StudentRun, stores: list[Store], world: World) -> dict[str, Any]:
    """Trains a student in a directory that is locked as long as rank 0 lives: ranks may outlive a killed
    launcher. Raises UserError if another training holds the lock, if the directory is not writable, or if it
    holds a student with other settings."""
    from student_train.engine.checkpoint_format import newest_fingerprint
    from student_train.student.model_directory import require_same

    with contextlib.ExitStack() as contexts:
        remote = mirrored(run.directory, run.train.cache_dir)
        mirror = world.on_all_ranks(lambda: contexts.enter_context(remote))
        directory = mirror.local if mirror else run.directory

        def lock() -> None:
            contexts.enter_context(exclusive(directory))
            storage.require_writable(directory)
            started = newest_fingerprint(storage.join(directory, "checkpoints"))
            if started is not None:  # before recipe.yaml is replaced
                require_same(started, _fingerprint(run, stores), run.directory)

        world.on_rank_0(lock)
        return _train(run, stores, world, mirror)


def _train(run: StudentRun, stores: list[Store], world: World, mirror: Mirror | None) -> dict[str, Any]:
    """Trains a student, writes its model directory, and registers it with MLflow. Returns its results: steps,
    kind of soft targets, last training losses and validation metrics."""
    import transformers

    from infra.cpu.processor import warn_if_slow
    from infra.tracking import run as tracking
    from student_train.data.loss_needs import checked_soft_target_kind, teacher_output_layout
    from student_train.engine.determinism import deterministic
    from student_train.engine.engine import Engine
    from student_train.objectives.freezing import frozen_parameters
    from student_train.student.model_directory import publish_model
    from student_train.student_and_loss import model_and_objective
    from student_train.trainer import Trainer

    transformers.logging.disable_progress_bar()
    if world.is_rank_0 and world.device.type == "cpu":
        warn_if_slow("train.dtype", run.train.dtype)
    store, directory = stores[0], mirror.local if mirror else run.directory
    world.on_rank_0(lambda: run.recipe.save(directory))
    model, objective = world.on_all_ranks(lambda: model_and_objective(run, store, world))
    frozen = frozen_parameters(model)  # copied before Engine rounds them to train.dtype
    fingerprint, layout = _fingerprint(run, stores), teacher_output_layout(run.train, store.layout)
    with (
        deterministic(run.train.deterministic),
        tracking.start_run(run.recipe, "student", world.rank, run.name) as tracked,
    ):
        tracked.log_store(run.recipe.store_path, store.digest)
        engine = world.on_all_ranks(lambda: Engine(model, run.train, world))
        trainer = Trainer(run, world, stores, model, objective, engine, tracked, fingerprint, mirror)
        validated = trainer.train()
        results = {
            "steps": trainer.total_steps,
            "soft_targets": checked_soft_target_kind(run.train, layout),
            "training": trainer.history.last_losses(),
            "validation": validated,
        }
        weights = {**engine.gather()["weights"], **frozen}

        def publish() -> None:
            path = publish_model(run, directory, model, weights, stores, fingerprint, results)
            if mirror:
                mirror.push()
            tracked.register_model(path, run.registered_name, tags={"store": store.digest})

        world.on_rank_0(publish)
    return results


def _print_results(run: StudentRun, results: dict[str, Any], what: str) -> None:
    rows = [("steps", f"{results['steps']:,}"), ("soft targets", results["soft_targets"] or "none")]
    rows += [(name, f"{value:.5g}") for name, value in results["training"].items()]
    rows += [(f"validation {name}", f"{value:.5g}") for name, value in results["validation"].items()]
    print(
        f"\nstudent {run.recipe.name}/{run.name}: {what}\n{console.table(rows, ['measure', 'value'])}\n"
        f"{run.directory}/model"
    )


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command and exits. Rank 0 prints errors.

    An error before the ranks are connected usually occurs on all of them. Then rank 0 prints it, and the
    launcher ends the others, which wait for that. A rank that is not ended within ``WAIT_SECONDS`` has an
    error of its own, for example a directory that its machine lacks, and prints it.
    """
    rank = rank_of_environment()
    if rank == 0:
        console.command(lambda: run(parse(arguments)))
    with contextlib.suppress(KeyboardInterrupt):
        try:
            sys.exit(run(parse(arguments)))
        except UserError as problem:
            time.sleep(WAIT_SECONDS)
            place = f"rank {rank} on {socket.gethostname()}"
            print(f"error: {place}: {problem}", file=sys.stderr, flush=True)
            sys.exit(problem.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        end_process(int(ended.code or 0))
