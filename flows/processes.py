"""The processes that run flows on a root: which of them live, and which were killed.

Each holds a lock on a file of its own in ``running/`` in the root, and removes the file at its end. The system frees
the lock of a killed process, so a file without a lock tells of a kill, whatever clocks and process numbers say. The
file lists the process's Prefect flow runs, the outputs that it needs, and the remote roots that have a list of these
(`flows.claims`); its MLflow runs have the file's name as a tag. All remote roots share the folder of the default root.
"""

import atexit
import fcntl
import getpass
import logging
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from flows.servers import local_home
from storage import uri
from storage.errors import DitflowError

LOGGER = logging.getLogger(__name__)
FOLDER = "running"
UUID_LENGTH = 36  # a line may be cut short
_mine: dict[Path, tuple[Path, int]] = {}
"""File and lock of this process, for each folder that it has joined."""


@dataclass(frozen=True)
class Processes:
    """The other processes of a root."""

    killed: dict[Path, set[str]]
    """Their files, each with the ids of its flow runs."""
    living: dict[Path, set[str]]
    needed: dict[Path, set[str]] = field(default_factory=dict)
    """The outputs, as paths below the root, that living processes need; none of one whose file cannot be read."""


def join(root: str) -> str:
    """Name this process among those of the root; empty if the root's file system cannot tell whether it lives."""
    folder = local_home(root) / FOLDER
    if folder not in _mine:
        try:
            _mine[folder] = _join(folder)
        except OSError as error:
            LOGGER.warning("%s: runs that a kill leaves open will stay so: %s", folder, error)
            return ""
        atexit.register(leave, root)
    return _mine[folder][0].name


def note(flow_run_id: str | None, root: str) -> None:
    """Remember that this process runs a flow of the root."""
    if flow_run_id:
        write([flow_run_id], root)


def write(lines: Iterable[str], root: str) -> None:
    """Append lines to the file of this process."""
    if join(root):
        _, lock = _mine[local_home(root) / FOLDER]
        os.write(lock, "".join(f"{line}\n" for line in lines).encode())


def leave(root: str, *, told: bool = True) -> None:
    """End what `join` began; the runs of this process have ended.

    Args:
        root: folder of all outputs.
        told: whether Prefect knows that. Else the file stays, as that of a killed process, and the next command tells.
    """
    joined = _mine.pop(local_home(root) / FOLDER, None)
    if joined is not None:
        path, lock = joined
        if told:
            forget(root, path)
        os.close(lock)


def forget(root: str, path: Path) -> None:
    """Remove what remote roots have of a process that has ended or was killed, and then its file.

    If a store refuses, the file stays, as that of a killed process, for the next command.

    Args:
        root: folder of all outputs.
        path: the file, which may name other roots.
    """
    lines: list[str] = []
    with suppress(FileNotFoundError):  # another command does the same
        lines = path.read_text("utf-8", "replace").splitlines()
    try:
        for place in dict.fromkeys([root, *(line for line in lines if "://" in line)]):
            if uri.local_path(place) is None:
                uri.remove_tree(shared(place, path.name), place)
    except DitflowError as error:
        LOGGER.warning("%s; until a later command has done that, `ditflow gc` keeps what this process needed", error)
    else:
        path.unlink(missing_ok=True)


def shared(root: str, name: str) -> str:
    """The URL at which all machines see what a process tells of itself."""
    return uri.join(root, FOLDER, name)


def others(root: str) -> Processes:
    """The other processes of a root. One counts as living unless the locks of this machine tell that it was killed."""
    folder, processes = local_home(root) / FOLDER, Processes({}, {})
    mine, _ = _mine.get(folder, (None, None))
    for path in _files(folder):
        name, _, host = path.name.partition("@")
        if path == mine or not name:
            continue
        try:
            file = path.open("rb")
        except FileNotFoundError:  # it has just ended
            continue
        except OSError:  # another user's
            processes.living[path] = set()
            continue
        with file:
            killed = host == socket.gethostname() and _locked(file.fileno(), fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:
                lines = set(file.read().decode(errors="replace").splitlines())
                needed = {line for line in lines if "/" in line and "://" not in line}
                runs = {line for line in lines if "/" not in line and len(line) == UUID_LENGTH}
                (processes.killed if killed else processes.living)[path] = runs
                processes.needed.update({} if killed else {path: needed})
    return processes


def user() -> str:
    """The name of the user of this process, or the number of one without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        return str(os.getuid())


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # there is none, or it is another user's
        return []


def _join(folder: Path) -> tuple[Path, int]:
    """A file that has its lock before the others see it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{uuid4().hex}@{socket.gethostname()}"
    unseen = path.with_name(f"@{path.name}")
    lock = os.open(unseen, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
    try:
        _locked(lock, fcntl.LOCK_EX)
        unseen.rename(path)
    except OSError:  # a file system without locks
        unseen.unlink()
        os.close(lock)
        raise
    return path, lock


def _locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
