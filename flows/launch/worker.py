"""One rank of a stage, as torchrun starts it: ``python -m flows.launch.worker spec.json``.

The rank reports to the launcher on stdout: its progress, and the error that ended it, each as a line of JSON behind
`MARK`. All other lines are its log.

On SIGTERM training saves a checkpoint and the rank exits with 75. Any other stage exits with 143 and keeps the units
that it has committed. The launcher (`flows.launch.start`) then restarts all ranks. When torchrun dies, the kernel
kills the rank.
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

from flows import temporary
from flows.children import set_parent_death_signal
from flows.contract import STAGES
from flows.launch.rank_log import MARK
from flows.launch.spec import LAUNCHER, WorkerSpec
from storage.cost import metered
from storage.errors import DitflowError, InputError, PreemptedError
from storage.patience import patient
from storage.tracker import NullTracker, Tracker

if TYPE_CHECKING:
    from flows.tracking.sink import StageTracker


def main(path: str) -> int:
    """Run the stage of a spec file on this rank; return its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    end_with_launcher()
    temporary.hold()
    assert isinstance(sys.stdout, io.TextIOWrapper)
    # As the launcher reads it, whatever the locale, and in whole lines: all ranks share one pipe.
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=False)
    logging.basicConfig(level=logging.INFO, format=f"[rank {rank}] %(message)s", stream=sys.stdout, force=True)
    code = 0
    with ExitStack() as cleanup:  # closing the tracker can take 10 s: the error is reported first
        try:
            _run(WorkerSpec.model_validate_json(Path(path).read_bytes()), rank, cleanup)
        except Exception as error:
            report_error(error, rank)
            code = PreemptedError.EXIT_CODE if isinstance(error, PreemptedError) else 1
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when another rank ends first
    return code


def end_with_launcher() -> None:
    """Be killed when torchrun dies, and do not start if the launcher has died already."""
    set_parent_death_signal(os.getppid(), signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher and int(launcher) not in [parent.pid for parent in psutil.Process().parents()]:
        raise SystemExit(f"the launcher, process {launcher}, has ended")


def _run(spec: WorkerSpec, rank: int, cleanup: ExitStack) -> None:
    stage = STAGES[spec.stage]
    cleanup.enter_context(patient(spec.patience))
    config = stage.config.model_validate(spec.config)  # imports torch, after logging is set up
    from flows.launch.gauge import gauge

    cleanup.enter_context(metered(spec.output.uri, gauge(int(os.environ.get("LOCAL_RANK", "0"))), rank))
    tracker: Tracker = NullTracker()
    if rank == 0:
        tracker = sending = _tracker(spec)
        cleanup.callback(sending.close, spec.output)
    stage.run(config, stage.source(spec.source), out=spec.output, tracker=tracker)


def _tracker(spec: WorkerSpec) -> "StageTracker":
    from flows.tracking.runs import skip_recorded
    from flows.tracking.sink import MlflowSink, StageTracker

    tracking = skip_recorded(spec.tracking, spec.output)  # the ranks may have been restarted
    return StageTracker(MlflowSink(tracking.uri, tracking.run_id, tracking.skip_to), _report_progress)


def _report_progress(done: int, total: int, unit: str) -> None:
    _report({"done": done, "total": total, "unit": unit})


def report_error(error: Exception, rank: int) -> None:
    """Tell the launcher what ended this rank."""
    if not isinstance(error, InputError | PreemptedError):
        sys.stdout.writelines(f"[rank {rank}] {line}\n" for line in traceback.format_exc().splitlines())
    first_line = str(error).strip().partition("\n")[0]
    expected = isinstance(error, DitflowError)
    _report({"error": first_line, "kind": type(error).__name__, "rank": rank, "foreseen": expected})


def _report(message: dict[str, Any]) -> None:
    try:
        sys.stdout.write(MARK + json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the launcher was killed: SIGTERM follows, and training still saves a checkpoint
        pass


def _exit_on_sigterm(*_: Any) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
