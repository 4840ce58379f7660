"""What ranks say: their log, their progress, and the error that ended them."""

import json
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from storage.errors import DitflowError, InputError, PreemptedError

MARK = "@@ditflow "
"""Begins a line that is meant for the launcher: JSON follows."""
TAIL = 200  # lines: torchrun's last word on up to 20 ranks
PLAIN: dict[str, type[DitflowError]] = {kind.__name__: kind for kind in (InputError, PreemptedError)}
"""Errors of ranks that are raised as they are."""
_ENDED = re.compile(r"^ +rank +: (\d+) .*\n +exitcode +: (-?\d+) ", re.MULTILINE)

Progress = Callable[[int, int, str], None]


class WorkerError(DitflowError):
    """A rank failed by a fault of its own."""


class LostRankError(WorkerError):
    """A rank was killed, or failed as nobody foresaw: another attempt may fare better."""


class RankLog:
    """Sorts the lines of all ranks into log, progress and errors, and remembers what explains an end.

    Args:
        progress: is told how far the stage is: done, total, unit.
        log: is given the lines that are for people.
    """

    def __init__(self, progress: Progress, log: Callable[[str], None]) -> None:
        self._progress, self._log = progress, log
        self._errors: list[dict[str, Any]] = []
        self._tail: deque[str] = deque(maxlen=TAIL)

    def take(self, lines: Iterable[str]) -> None:
        """Read lines, as they come."""
        for line in lines:
            self._take(line.rstrip("\n"))

    def failure(self, code: int) -> DitflowError:
        """The cause among the effects: when one rank goes, the others lose their connection and fail too.

        Args:
            code: that the command ended with.
        """
        foreseen = [error for error in self._errors if error["foreseen"]]
        for error in sorted(foreseen, key=lambda error: error["kind"] not in PLAIN):
            return PLAIN[error["kind"]](error["error"]) if error["kind"] in PLAIN else WorkerError(_told(error))
        if any("RendezvousTimeoutError" in line for line in self._tail):  # torchrun's
            return WorkerError("not all machines have come; give the same command on each, or launch fewer nodes")
        ended = [(rank, int(number)) for rank, number in _ENDED.findall("\n".join(self._tail))]
        for rank, number in ended:
            if number < 0 and -number != signal.SIGTERM:  # which torchrun sends to all when one is gone
                why = ", perhaps for want of memory" if -number == signal.SIGKILL else ""
                return LostRankError(f"rank {rank} was killed by {signal.Signals(-number).name}{why}")
        for error in self._errors:
            return LostRankError(_told(error))
        rank, number = ended[-1] if ended else ("0", code)
        return LostRankError(f"rank {rank} ended with code {number} and no word; its log has the rest")

    def _take(self, line: str) -> None:
        text, _, marked = line.partition(MARK)
        message = _message(marked)
        if message is None or text:
            self._tail.append(line if message is None else text)
            self._log(self._tail[-1])
        if message is not None and "error" in message:
            self._errors.append(message)
        elif message is not None:
            self._progress(message["done"], message["total"], message["unit"])


def _told(error: dict[str, Any]) -> str:
    return f"rank {error['rank']} failed: {error['kind']}: {error['error']}"


def _message(text: str) -> dict[str, Any] | None:
    """What a rank tells us; None if it is only a line of its log, or two ranks wrote over each other."""
    try:
        message = json.loads(text)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
