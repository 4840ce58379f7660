"""Start a stage under torchrun, and bring back its log, its progress and its error."""

import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from flows import runs
from flows.process import child
from flows.worker import LAUNCHER, MARK, WorkerSpec
from storage.config import Config
from storage.errors import DitflowError, InputError, PreemptedError

LOG_TAIL = 200  # lines: torchrun's last word on up to 20 ranks
SHUTDOWN_SECONDS = 15  # that torchrun gives its ranks, within what we give torchrun
PLAIN: dict[str, type[DitflowError]] = {kind.__name__: kind for kind in (InputError, PreemptedError)}
"""Errors of ranks that are raised as they are."""
_ENDED = re.compile(r"^ +rank +: (\d+) .*\n +exitcode +: (-?\d+) ", re.MULTILINE)


class LocalLaunch(Config):
    """Ranks on this machine, under one torchrun."""

    kind: Literal["local"] = "local"
    nproc: int = Field(1, ge=1)
    """Ranks to start: one a GPU, or on CPU any number."""
    max_restarts: int = Field(3, ge=0)
    """How often all ranks start again, from their last checkpoint, when one is lost."""


class WorkerError(DitflowError):
    """A rank failed by a fault of its own."""


class LostRankError(WorkerError):
    """A rank was killed, or failed as nobody foresaw: another attempt may fare better."""


def run(
    spec: WorkerSpec,
    launch: LocalLaunch,
    *,
    progress: Callable[[int, int, str], None],
    log: "logging.Logger | logging.LoggerAdapter[Any]",
) -> None:
    """Run a stage on all ranks and wait for them.

    Lines of all ranks go to ``log``. When the caller is cancelled or killed, the ranks end too. When
    a rank is lost, all start again: a whole new torchrun, since a torchrun that restarts can hang.

    Raises:
        InputError: a rank found the user's input wrong.
        PreemptedError: the ranks were told to stop, and have saved.
        WorkerError: a rank failed or was killed; if it failed, its traceback is in the log.
    """
    for attempt in range(launch.max_restarts + 1):
        try:
            return _run(spec, launch, progress, log)
        except LostRankError as error:
            if attempt == launch.max_restarts:
                raise
            log.warning("%s; starting all ranks again, %d of %d times", error, attempt + 1, launch.max_restarts)
            spec = spec.model_copy(update={"tracking": runs.caught_up(spec.tracking, spec.output)})
    return None


def _run(
    spec: WorkerSpec,
    launch: LocalLaunch,
    progress: Callable[[int, int, str], None],
    log: "logging.Logger | logging.LoggerAdapter[Any]",
) -> None:
    with tempfile.TemporaryDirectory(prefix="ditflow-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(spec.model_dump_json())
        errors: list[dict[str, Any]] = []
        tail: deque[str] = deque(maxlen=LOG_TAIL)
        with child(_command(launch, path), env=_env()) as process:
            assert process.stdout is not None
            for line in process.stdout:
                _take(line.rstrip("\n"), errors, tail, progress, log)
            code = process.wait()
    if code != 0:
        raise _failure(code, errors, "\n".join(tail))


def _command(launch: LocalLaunch, spec: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--local-addr=127.0.0.1"]
    return [*torchrun, f"--nproc-per-node={launch.nproc}", "-m", "flows.worker", str(spec)]


def _env() -> dict[str, str]:
    return {
        LAUNCHER: str(os.getpid()),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        # A shared store can hang the ranks: https://github.com/pytorch/pytorch/issues/135712
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def _take(
    line: str,
    errors: list[dict[str, Any]],
    tail: deque[str],
    progress: Callable[[int, int, str], None],
    log: "logging.Logger | logging.LoggerAdapter[Any]",
) -> None:
    text, _, marked = line.partition(MARK)
    message = _message(marked)
    if message is None or text:
        tail.append(line if message is None else text)
        log.info(tail[-1])
    if message is not None and "error" in message:
        errors.append(message)
    elif message is not None:
        progress(message["done"], message["total"], message["unit"])


def _message(text: str) -> dict[str, Any] | None:
    """What a rank tells us; None if it is only a line of its log, or two ranks wrote over each other."""
    try:
        message = json.loads(text)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _failure(code: int, errors: list[dict[str, Any]], tail: str) -> DitflowError:
    """The cause among the effects: when one rank goes, the others lose their connection and fail too."""
    for error in sorted((error for error in errors if error["foreseen"]), key=lambda error: error["kind"] not in PLAIN):
        if error["kind"] in PLAIN:
            return PLAIN[error["kind"]](error["error"])
        return WorkerError(_told(error))
    ended = [(rank, int(number)) for rank, number in _ENDED.findall(tail)]
    for rank, number in ended:
        if number < 0 and -number != signal.SIGTERM:  # which torchrun sends to all when one is gone
            why = ", perhaps for want of memory" if -number == signal.SIGKILL else ""
            return LostRankError(f"rank {rank} was killed by {signal.Signals(-number).name}{why}")
    for error in errors:
        return LostRankError(_told(error))
    rank, number = ended[-1] if ended else ("0", code)
    return LostRankError(f"rank {rank} ended with code {number} and no word; its log has the rest")


def _told(error: dict[str, Any]) -> str:
    return f"rank {error['rank']} failed: {error['kind']}: {error['error']}"
