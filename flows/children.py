"""Child processes that never outlive their parent.

`child` runs a command for the length of a ``with`` block. At the end of the block, also when the flow is cancelled,
the child receives SIGTERM, and SIGKILL after `GRACE_SECONDS`. When the parent is killed and cannot do that, the kernel
sends SIGTERM to the child instead (PR_SET_PDEATHSIG, Linux alone).
"""

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
"""How long a child has between SIGTERM and SIGKILL, to save a checkpoint. Prefect's runner waits 30 s for a flow."""

_PR_SET_PDEATHSIG = 1
# Looked up at import: between fork and exec a child must not take a lock.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@contextmanager
def child(
    command: Sequence[str],
    *,
    env: Mapping[str, str | None] | None = None,
    output: int | IO[bytes] = subprocess.PIPE,
    errors: int | IO[bytes] = subprocess.STDOUT,
    keep: Sequence[int] = (),
) -> Iterator[subprocess.Popen[str]]:
    """Run a command for the length of the block.

    The output goes to a pipe, because an inherited stdout keeps a Prefect flow run alive until the child ends. The
    child has its own session, so Ctrl-C reaches the parent alone, which ends its children in order. When the block
    ends, normally or by an exception, and the child still runs, it receives SIGTERM. When it has ended, or after
    `GRACE_SECONDS`, what is left of its process group is killed. On Linux the child also receives SIGTERM when the
    thread that runs the block dies.

    Args:
        command: program and arguments.
        env: variables to add to the environment, or with None to leave out.
        output: receives stdout.
        errors: receives stderr. Default: what receives stdout.
        keep: descriptors that stay open in the child.
    """
    variables = {**os.environ, **(env or {})}
    process = subprocess.Popen(
        command,
        env={name: value for name, value in variables.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        pass_fds=keep,
        preexec_fn=partial(set_parent_death_signal, os.getpid()),
    )
    try:
        yield process
    finally:
        _stop(process)


def set_parent_death_signal(parent: int, number: int = signal.SIGTERM) -> None:
    """Let the kernel send a signal to this process when its parent dies. Does nothing on systems other than Linux.

    Args:
        parent: pid of the parent. If this process has another parent by now, the signal is sent at once.
        number: the signal.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def terminate_with_prefect_worker() -> None:
    """Send SIGTERM to this flow run when the Prefect worker that started it is killed: Prefect itself does not."""
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        set_parent_death_signal(os.getppid())


def has_ended(process: "subprocess.Popen[str]") -> bool:
    """Whether a child has ended. What is left of its group is killed at once, before the number is another group's."""
    if process.returncode is None and process.poll() is not None:
        _kill_group(process)
    return process.returncode is not None


def _stop(process: "subprocess.Popen[str]") -> None:
    try:
        if not has_ended(process):
            with _sigterm_ignored():
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=GRACE_SECONDS)  # also reads: a full pipe would block the child
                _kill_group(process)
                process.wait()
    except (Exception, KeyboardInterrupt):  # such as a second Ctrl-C during the wait
        if process.returncode is None:
            _kill_group(process)
            process.wait()
        raise
    except BaseException:  # what a handler makes of a second SIGTERM, before it was ignored
        _stop(process)
        raise
    if process.stdout is not None:
        process.stdout.close()


def _kill_group(process: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for a dead group
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """A flow run whose worker ends receives SIGTERM repeatedly: from Prefect, and from the kernel.

    The kernel may send it for each thread of a killed process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
