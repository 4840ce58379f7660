"""Run the checks in a process of their own, so that one that hangs or crashes does not stop the others."""

import json
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from signal import Signals
from typing import Any

from pydantic import TypeAdapter

from flows.children import child
from flows.doctor.table import Asked, Check
from flows.launch.rank_log import MARK
from storage.finding import Finding, failed

TAIL = 60
"""Lines that are kept of what a check printed."""


@dataclass(frozen=True)
class Result:
    """What a check found, how long it took, and, unless all was well, what it printed."""

    check: Check
    finding: Finding
    seconds: float
    printed: str = ""


def examine(asked: Asked, checks: Sequence[Check]) -> Iterator[Result]:
    """The result of each check, as soon as it is there."""
    left = list(checks)
    while left:
        for result in _one_process(asked, list(left)):
            left.remove(result.check)
            yield result


def _one_process(asked: Asked, checks: Sequence[Check]) -> Iterator[Result]:
    """The results of checks in one process, up to the one that ends it, if one does."""
    given = {"asked": TypeAdapter(Asked).dump_python(asked), "checks": [asdict(check) for check in checks]}
    command = [sys.executable, "-m", "flows.doctor.worker", json.dumps(given)]
    with child(command, env={"OMP_NUM_THREADS": "1"}) as process:  # small models are slower on several threads
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        for check in checks:
            printed: deque[str] = deque(maxlen=TAIL)
            try:
                message = _message(lines, printed, check.limit)
            except queue.Empty:
                remedy = "see what hangs, or leave it out with --only"
                yield Result(
                    check, failed(f"no answer within {check.limit:.0f} s", remedy), check.limit, _text(printed)
                )
                return
            if message is None:
                code = process.wait()
                how = f"by {Signals(-code).name}" if code < 0 else f"with code {code}"
                last = next((line for line in reversed(printed) if line.strip()), "nothing was printed")
                seen = f"its process ended {how}: {last.strip()[:200]}"
                yield Result(check, failed(seen, "see --json for all that was printed"), 0.0, _text(printed))
                return
            finding = Finding(**message["finding"])
            text = "" if finding.state in ("ok", "skipped") else _text(printed)
            yield Result(check, finding, message["seconds"], text)
            if message["ends"]:
                return


def _read(output: Iterable[str], lines: "queue.Queue[str | None]") -> None:
    for line in output:
        lines.put(line)
    lines.put(None)


def _message(lines: "queue.Queue[str | None]", printed: deque[str], limit: float) -> dict[str, Any] | None:
    """What the process tells next; None if it has ended.

    Raises:
        queue.Empty: it told nothing within the limit.
    """
    deadline = time.monotonic() + limit
    while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
        if line.startswith(MARK):
            message: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return message
        printed.append(line.rstrip())
    return None


def _text(printed: Iterable[str]) -> str:
    return "\n".join(printed).strip()
