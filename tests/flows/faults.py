"""Faults for real: processes to kill, servers to take down."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from prefect.context import refresh_global_settings_context
from prefect_rest import PASSWORD
from until import until

from flows import servers
from flows.prefect_server import flush_logs


def gone(pid: int) -> bool:
    """Whether a process has ended; an orphan that nobody reaps has ended too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(pids: Iterable[int]) -> bool:
    return all(gone(pid) for pid in pids)


def descendants(pid: int | None = None) -> list[int]:
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    """Run a script in a Python of its own; its stdout is a pipe."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def prefect_at(address: str) -> Iterator[None]:
    """Flows of this process, in any of its threads, and of its children run against this Prefect server."""
    with ExitStack() as stack:
        stack.callback(refresh_global_settings_context)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PREFECT_API_URL", f"{address}/api")
        patch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
        stack.callback(flush_logs)
        refresh_global_settings_context()
        yield


def dead_address() -> str:
    """The address of a server that is not there."""
    return f"http://{servers.HOST}:{servers.free_port()}"


class MlflowServer:
    """An MLflow server that can be killed and started again at the same address."""

    def __init__(self, folder: Path, template: Path) -> None:
        folder.mkdir(parents=True)
        shutil.copy(template, folder / "mlflow.db")
        self.folder, self.port = folder, servers.free_port()
        self.address = f"http://{servers.HOST}:{self.port}"
        self._stack = ExitStack()
        self._mine: list[int] = []

    def start(self) -> None:
        """Start it unless it runs."""
        if not self._mine:
            before = set(descendants())
            self._stack.enter_context(servers.mlflow_server(self.folder, self.port))
            self._mine = [pid for pid in descendants() if pid not in before]

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        for pid in self._mine:
            os.kill(pid, signal.SIGKILL)
        until(lambda: all_gone(self._mine))
        self._mine = []
        self._stack.close()

    def stop(self) -> None:
        self._stack.close()
