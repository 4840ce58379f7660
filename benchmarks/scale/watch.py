"""Runs a command, and watches the memory and the processor time of all its processes."""

import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

INTERVAL = 0.2
"""Seconds between two looks."""
_KINDS = {"torch.distributed": "torchrun", "flows.launch.worker": "rank", "prefect": "Prefect", "mlflow": "MLflow"}


@dataclass
class Watched:
    """A command that has ended."""

    seconds: float = 0.0
    output: str = ""
    """What it printed to stdout."""
    peaks: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    """Largest memory of a process in bytes, by phase and kind of process, without pages of mapped files."""
    processor: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of processor time of all processes, by phase."""

    def peak(self, phase: str) -> int:
        """Largest memory of any process in a phase."""
        return max(self.peaks[phase].values(), default=0)


def watch(command: Sequence[str], phase: Callable[[], str]) -> Watched:
    """Run a command to its end.

    Args:
        command: the command.
        phase: what it is doing now.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    watched, looks = Watched(), _Looks()
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        while process.poll() is None:
            looks.take(psutil.Process(process.pid), phase(), watched)
            with suppress(subprocess.TimeoutExpired):
                process.wait(INTERVAL)
        watched.seconds = time.perf_counter() - begin
        out.seek(0)
        watched.output = out.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return watched


class _Looks:
    """What was seen of each process so far."""

    def __init__(self) -> None:
        self._kinds = dict[psutil.Process, str]()
        self._times = dict[psutil.Process, float]()

    def take(self, top: psutil.Process, phase: str, watched: Watched) -> None:
        """Look at a process and all below it."""
        with suppress(psutil.Error):
            for process in (top, *top.children(recursive=True)):
                with suppress(psutil.Error):
                    self._look(process, process == top, phase, watched)

    def _look(self, process: psutil.Process, is_top: bool, phase: str, watched: Watched) -> None:
        with process.oneshot():
            memory, times = process.memory_info(), process.cpu_times()
        if process not in self._kinds:
            self._kinds[process] = "command" if is_top else _kind(" ".join(process.cmdline()))
        peaks, kind = watched.peaks[phase], self._kinds[process]
        peaks[kind] = max(peaks[kind], memory.rss - memory.shared)
        spent = times.user + times.system
        watched.processor[phase] += spent - self._times.get(process, 0.0)
        self._times[process] = spent


def _kind(command: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in command), "other")
