"""The one exception a user may see, with its kinds and exit codes."""

from __future__ import annotations

EXIT_USER_ERROR = 2
EXIT_INCOMPLETE = 3
"""The work that could be done is done, but something is missing (quarantined tasks, unscored tasks)."""
EXIT_UNMET = 4
"""The work is done, but a result is worse than the recipe requires."""


LONGEST_MESSAGE = 2000
"""Characters: what is quoted from a hostile file must not flood a log."""


class UserError(Exception):
    """A mistake that the user can correct: one sentence that says what is wrong, where, and what to do.

    Commands print it as ``error: <sentence>`` on stderr, without a traceback, and exit with ``exit_code``.
    Violated invariants of our own code are ``assert`` and do show a traceback.
    """

    def __init__(self, message: str, exit_code: int = EXIT_USER_ERROR) -> None:
        line = " ".join(message.split())
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 3]}...")
        self.exit_code = exit_code


class NodeError(UserError):
    """A fault of one machine, its network, or a service as this machine sees it: a full disk, an object store
    that answers 503, a hub that throttles.

    A command by itself ends with it as with any mistake. A worker of a teacher pass is replaced, and its work
    is given to another worker.
    """


class WrongContent(UserError):
    """A file is there but its digest is not the recorded one."""


class DamagedFile(UserError):
    """A compressed file cannot be decompressed to its end."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:300]
