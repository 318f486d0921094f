"""What the launcher (deepspeed, torchrun) says of this process in its environment. Imports no torch: how many
threads it has is read from the environment once, when it is loaded."""

from __future__ import annotations

import os


def rank_of_environment() -> int:
    """The rank the launcher gave this process; 0 without a launcher. Known before anything is set up."""
    return int(os.environ.get("RANK", "0"))


def share_cores() -> None:
    """One rank's share of the cores for its threads; call it before torch is imported.

    torchrun says 1, the deepspeed launcher nothing: then every rank would start a thread on every core, and
    ranks would wait for each other's spinning threads.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
