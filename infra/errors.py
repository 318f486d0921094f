"""The exception for mistakes that a user can correct, its subclasses, and the exit codes of commands."""

from __future__ import annotations

EXIT_USER_ERROR = 2
EXIT_INCOMPLETE = 3
"""The work that could be done is done, but something is missing (quarantined tasks, unscored tasks)."""
EXIT_UNMET = 4
"""The work is done, but a result is worse than the recipe requires."""

LONGEST_MESSAGE = 2000
"""Largest number of characters of a message; text quoted from a hostile file must not flood a log."""


class UserError(Exception):
    """A mistake that the user can correct: one sentence that says what is wrong, where, and what to do.

    Commands print it as ``error: <sentence>`` on stderr, without a traceback, and exit with ``exit_code``.
    Violated invariants of our own code are ``assert`` statements, which do show a traceback.
    """

    def __init__(self, message: str, exit_code: int = EXIT_USER_ERROR) -> None:
        line = " ".join(message.split())
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 3]}...")
        self.exit_code = exit_code


class NodeError(UserError):
    """A fault of one machine, its network, or a service that it uses: a full disk, an object store that
    answers 503, a hub that throttles.

    A command that runs on one machine ends with this error as with any UserError. In a teacher pass, the
    worker that raises it is replaced, and its work goes to another worker.
    """


class WrongContent(UserError):
    """A file exists, but its digest differs from the recorded one."""


class DamagedFile(UserError):
    """A compressed file cannot be decompressed to its end, or a Parquet or JSON file cannot be read."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:300]
