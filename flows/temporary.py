"""Temporary folders that no kill leaves for long.

A command, its child processes and the libraries in them keep everything temporary below one folder (`of_command`),
which the command removes at its end. A folder is in use for as long as a process holds a lock on it, and the system
frees the locks of killed processes. So whoever makes a folder removes the unlocked ones beside it.
"""

import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from storage.errors import InputError, one_line
from storage.rows import cache

LOGGER = logging.getLogger(__name__)
PREFIX = ".ditflow-temporary-"
_held: list[int] = []  # the locks of this process, which end with it


@contextmanager
def of_command() -> Iterator[None]:
    """Let all temporary files of this process and its children lie in one folder for the length of the block.

    Code that torch has compiled goes to this machine's cache instead, where later commands find it.

    Raises:
        InputError: there is no folder for temporary files.
    """
    before = dict(os.environ)
    with ExitStack() as stack:
        try:
            place = tempfile.gettempdir()
            inside = stack.enter_context(folder(Path(place), PREFIX))
        except OSError as error:
            raise InputError(
                f"temporary files cannot be written ({error}); set TMPDIR to a folder with room"
            ) from error
        os.environ["TMPDIR"] = tempfile.tempdir = str(inside)
        _keep_compiled_code()
        try:
            yield
        finally:
            tempfile.tempdir = place
            for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
                os.environ.pop(name, None)
                os.environ |= {name: before[name]} if name in before else {}


def _keep_compiled_code() -> None:
    compiled = cache.root() / "torchinductor"
    with suppress(OSError):  # without a cache on this machine, it is compiled once for each command
        compiled.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))


def hold() -> None:
    """Keep the folder of the command that has started this process, for as long as this process lives."""
    command = Path(tempfile.gettempdir())
    if command.name.startswith(PREFIX) and not _held:
        with suppress(OSError):  # the command has ended, and this process will
            _held.append(_lock(command, fcntl.LOCK_SH))


def outside() -> str:
    """The folder for temporary files that outlive the command, such as those of a Slurm job."""
    place = Path(tempfile.gettempdir())
    while place.name.startswith(PREFIX):
        place = place.parent
    return str(place)


@contextmanager
def folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder for the length of the block; those of killed processes with the same prefix are removed.

    The name holds that of this machine: another one cannot tell whether a folder in a shared place is in use.
    """
    prefix = f"{prefix}{socket.gethostname()}-"
    _remove_abandoned(parent, prefix)
    made, lock = _make(parent, prefix)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)  # a child that is ending may write once more
        os.close(lock)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = _lock(made, fcntl.LOCK_SH)
        except (FileNotFoundError, BlockingIOError):  # it was taken for an abandoned one before it had the lock
            continue
        except OSError:  # a file system without such locks
            return made, os.open(made, os.O_RDONLY)
        if made.exists():
            return made, lock
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove folders that nobody holds. Nothing behind a symbolic link is removed."""
    for path in parent.iterdir():
        if not path.name.startswith(prefix):
            continue
        try:
            lock = _lock(path, fcntl.LOCK_EX)
        except OSError:  # in use, somebody else's, no folder, or on a file system without such locks
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            LOGGER.warning("%s: what a killed command left cannot be removed: %s", path, one_line(error))
        finally:
            os.close(lock)


def _lock(path: Path, kind: int) -> int:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock
