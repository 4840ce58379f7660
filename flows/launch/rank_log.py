"""The output of the ranks, sorted into log lines, progress, and the error that ended them.

Ranks write to one stream. A line of JSON behind `MARK` is a message for the launcher (see `flows.launch.worker`);
every other line is log. When the ranks have failed, `RankLog.failure` picks the error that caused the others.
"""

import json
import logging
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from flows.launch import torchrun
from storage.errors import DitflowError, InputError, PreemptedError

MARK = "@@ditflow "
"""Begins a message for the launcher; JSON follows."""
TAIL = 200  # lines: enough for torchrun's failure report on 20 ranks
RAISED_AS_IS: dict[str, type[DitflowError]] = {kind.__name__: kind for kind in (InputError, PreemptedError)}
"""Errors of ranks that keep their type and text; all others become a `WorkerError`."""
_EXIT_CODE = re.compile(r"^ +rank +: (\d+) .*\n +exitcode +: (-?\d+) ", re.MULTILINE)

Logger: TypeAlias = "logging.Logger | logging.LoggerAdapter[logging.Logger]"
Progress = Callable[[int, int, str], None]
"""Called with done, total and unit."""


class WorkerError(DitflowError):
    """A rank failed in a way that a restart does not mend."""


class LostRankError(WorkerError):
    """A rank was killed or failed with an unexpected error: a restart may succeed."""


class RankLog:
    """Sorts the lines of all ranks, and remembers what explains a failure.

    Args:
        progress: receives the progress messages.
        log: receives the log lines.
    """

    def __init__(self, progress: Progress, log: Callable[[str], None]) -> None:
        self._progress, self._log = progress, log
        self._errors: list[dict[str, Any]] = []
        self._tail: deque[str] = deque(maxlen=TAIL)

    def read(self, lines: Iterable[str]) -> None:
        """Sort lines as they arrive."""
        for line in lines:
            self._read_line(line.rstrip("\n"))

    def failure(self, code: int) -> DitflowError:
        """The error that caused the failure: when one rank ends, the others lose their connections and fail too.

        Errors that a rank expected come first, then torchrun's rendezvous timeout, then a signal that killed a rank,
        then unexpected errors, and last the bare exit code.

        Args:
            code: exit code of torchrun.
        """
        expected = [error for error in self._errors if error["foreseen"]]
        for error in sorted(expected, key=lambda error: error["kind"] not in RAISED_AS_IS):
            kind = RAISED_AS_IS.get(error["kind"])
            return kind(error["error"]) if kind else WorkerError(_describe(error))
        if any("RendezvousTimeoutError" in line for line in self._tail):
            seconds = torchrun.JOIN_TIMEOUT_SECONDS
            advice = "run the same command on every node, or set launch.nodes lower"
            return WorkerError(f"not all nodes joined within {seconds} s; {advice}")
        exits = [(rank, int(number)) for rank, number in _EXIT_CODE.findall("\n".join(self._tail))]
        for rank, number in exits:
            if number < 0 and -number != signal.SIGTERM:  # torchrun sends SIGTERM to the ranks that are left
                why = ", perhaps because memory ran out" if -number == signal.SIGKILL else ""
                return LostRankError(f"rank {rank} was killed by {signal.Signals(-number).name}{why}")
        for error in self._errors:
            return LostRankError(_describe(error))
        rank, number = exits[-1] if exits else ("0", code)
        return LostRankError(f"rank {rank} exited with code {number} and reported no error; see its log")

    def _read_line(self, line: str) -> None:
        text, _, marked = line.partition(MARK)
        message = _message(marked)
        if message is None or text:
            self._tail.append(line if message is None else text)
            self._log(self._tail[-1])
        if message is not None and "error" in message:
            self._errors.append(message)
        elif message is not None:
            self._progress(message["done"], message["total"], message["unit"])


def _describe(error: dict[str, Any]) -> str:
    return f"rank {error['rank']} failed: {error['kind']}: {error['error']}"


def _message(text: str) -> dict[str, Any] | None:
    """A message for the launcher; None if the text is log, or two ranks wrote into one line."""
    try:
        message = json.loads(text)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
