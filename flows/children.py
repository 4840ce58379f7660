"""Child processes that never outlive their parent."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO

GRACE_SECONDS = 20.0
"""How long a child may take to save and go after SIGTERM. A Prefect runner kills after 30 s."""

_PR_SET_PDEATHSIG = 1
# Looked up once, here: between fork and exec a child must not need any lock.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@contextmanager
def child(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, output: int | IO[bytes] = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """Run a command for the length of the block.

    Its output goes to a pipe, never to our own stdout: an inherited stdout keeps a Prefect flow run
    alive until the child ends. It has a session of its own, so that Ctrl-C reaches us alone and we
    end things in their order. On Linux the kernel sends it SIGTERM when the thread that runs the
    block dies, by SIGKILL too. When the block ends, by an exception or not, a child that still runs
    gets SIGTERM; after `GRACE_SECONDS` it and all processes of its session's group are killed.

    Args:
        env: variables to add to the environment.
        output: where stdout and stderr go, together.
    """
    process = subprocess.Popen(
        command,
        env=os.environ | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    try:
        yield process
    finally:
        _stop(process)


def die_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies; nothing on systems other than Linux.

    Args:
        parent: the parent's pid. If it is no longer the parent, it died already: the signal comes at once.
        number: the signal.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def die_with_worker() -> None:
    """Have a flow run that a Prefect worker has started end in order when the worker is killed: nobody else ends it."""
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        die_with_parent(os.getppid())


def _stop(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        try:
            with _deaf_to_sigterm():
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=GRACE_SECONDS)  # reads on: a full pipe would hold the child up
        finally:  # also when a second Ctrl-C cuts the wait short
            with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a dead group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Once is enough: a flow run whose worker is gone gets it from the kernel and from Prefect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
