"""What torchrun starts on every rank: a stage's spec in, its manifest out.

Everything that the launcher should know goes to stdout as one marked JSON line: progress, and the
error that ended a rank. All other lines are the rank's log.
"""

import io
import json
import logging
import os
import signal
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from flows.children import die_with_parent
from flows.contract import STAGES
from flows.launch.rank_log import MARK
from flows.launch.spec import LAUNCHER, WorkerSpec
from storage.errors import DitflowError, InputError, PreemptedError
from storage.tracker import NullTracker, Tracker

if TYPE_CHECKING:
    from flows.tracking.sink import StageTracker


def main(path: str) -> int:
    """Run the stage of a spec file on this rank; return its exit code.

    SIGTERM ends it in order: a stage that saves and goes with 75, any other with 143.
    """
    rank = int(os.environ.get("RANK", "0"))
    signal.signal(signal.SIGTERM, _terminated)
    _tie_to_launcher()
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True, write_through=False)  # whole lines: all ranks share one pipe
    logging.basicConfig(level=logging.INFO, format=f"[rank {rank}] %(message)s", stream=sys.stdout, force=True)
    code = 0
    with ExitStack() as last:  # closing the tracker can take a while: the error is told before
        try:
            _run(WorkerSpec.model_validate_json(Path(path).read_bytes()), rank, last)
        except Exception as error:
            _tell_error(error, rank)
            code = PreemptedError.EXIT_CODE if isinstance(error, PreemptedError) else 1
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when another rank is gone first
    return code


def _tie_to_launcher() -> None:
    """End with torchrun, at once; and do not begin if the launcher is gone already."""
    die_with_parent(os.getppid(), signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher and int(launcher) not in [parent.pid for parent in psutil.Process().parents()]:
        raise SystemExit("the launcher is gone")


def _run(spec: WorkerSpec, rank: int, last: ExitStack) -> None:
    stage = STAGES[spec.stage]
    config = stage.config.model_validate(spec.config)  # imports torch, after logging is set up
    tracker: Tracker = NullTracker()
    if rank == 0:
        tracker = sending = _tracker(spec)
        last.callback(sending.close, spec.output)
    stage.run(config, stage.source(spec.source), out=spec.output, tracker=tracker)


def _tracker(spec: WorkerSpec) -> "StageTracker":
    from flows.tracking.runs import caught_up
    from flows.tracking.sink import MlflowSink, StageTracker

    tracking = caught_up(spec.tracking, spec.output)  # this may be another attempt, after ranks were lost
    return StageTracker(MlflowSink(tracking.uri, tracking.run_id, tracking.skip_to), _tell_progress)


def _tell_progress(done: int, total: int, unit: str) -> None:
    _tell({"done": done, "total": total, "unit": unit})


def _tell_error(error: Exception, rank: int) -> None:
    if not isinstance(error, InputError | PreemptedError):
        sys.stdout.writelines(f"[rank {rank}] {line}\n" for line in traceback.format_exc().splitlines())
    first_line = str(error).strip().partition("\n")[0]
    foreseen = isinstance(error, DitflowError)
    _tell({"error": first_line, "kind": type(error).__name__, "rank": rank, "foreseen": foreseen})


def _tell(message: dict[str, Any]) -> None:
    try:
        sys.stdout.write(MARK + json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the launcher was killed: SIGTERM comes at once, and there is a step to save
        pass


def _terminated(*_: Any) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
