"""The outputs that processes need, which ``ditflow gc`` leaves alone.

A process lists in its file (`flows.processes`) each output that it reads or makes, before it looks whether the output
is there. In a remote root it also writes the list to an object of the same name in ``running/``, which other machines
see. Then it waits if anybody is deleting. Whoever deletes makes himself known first, and then reads the lists. So
either he finds an output in a list and leaves it, or the process waits, and finds the output gone.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from flows import processes
from flows.processes import FOLDER
from flows.servers import local_home
from storage import uri
from storage.errors import DitflowError

LOGGER = logging.getLogger(__name__)
DELETING = "@gc"
"""Name, in ``running/``, of what whoever deletes holds a lock on, or writes to a remote root."""
POLL_SECONDS = 2.0
_claimed: dict[tuple[str, str], set[str]] = {}
"""What this process has claimed, by root and its name there."""


def claim(root: str, keys: Iterable[str]) -> None:
    """Keep outputs from being deleted for as long as this process lives, whether they exist yet or not.

    Waits while somebody deletes.

    Args:
        root: folder of all outputs.
        keys: their paths below the root, ``stage/name``.

    Raises:
        StorageError: the store refuses.
    """
    name = processes.join(root)
    mine = _claimed.setdefault((root, name), set())
    new = sorted(set(keys) - mine)
    if not new or not name:
        return
    mine |= set(new)
    remote = uri.local_path(root) is None
    processes.write([*new, *([root] if remote else [])], root)
    if remote:
        uri.write(processes.shared(root, name), "".join(f"{key}\n" for key in sorted(mine)).encode())
    wait(root)


def claimed(root: str) -> dict[str, str]:
    """The outputs that other processes need, as paths below the root, each with the name of a process.

    Raises:
        DitflowError: somebody's list cannot be read.
        StorageError: the store does not answer.
    """
    others = processes.others(root)
    unknown = next((path for path in others.living if path not in others.needed), None)
    if unknown is not None:
        raise DitflowError(f"{unknown}: cannot be read, so nobody knows what this process needs; ask its owner")
    found = {key: path.name for path, keys in others.needed.items() for key in keys}
    dead = {path.name for path in others.killed}
    for name in uri.names(uri.join(root, FOLDER)) if uri.local_path(root) is None else ():
        if name != DELETING and name not in dead:
            data = uri.read_if_there(processes.shared(root, name)) or b""
            found |= dict.fromkeys(data.decode().split(), name)
    return found


def flow_runs(root: str) -> set[str]:
    """The ids of the Prefect flow runs of other living processes."""
    return {run for runs in processes.others(root).living.values() for run in runs}


@contextmanager
def deleting(root: str) -> Iterator[None]:
    """For the length of the block, no process of the root claims anything more. Waits while another one deletes.

    Raises:
        DitflowError: somebody else deletes in a remote root, or this user may not lock this one.
    """
    folder = local_home(root) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / DELETING, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DitflowError(f"{folder / DELETING}: cannot be locked ({error.strerror}); ask its owner") from error
    try:
        _lock(lock, fcntl.LOCK_EX, folder)
        if uri.local_path(root) is not None:
            yield
            return
        _announce(processes.shared(root, DELETING))
        try:
            yield
        finally:
            uri.remove_tree(processes.shared(root, DELETING), root)
    finally:
        os.close(lock)


def _announce(url: str) -> None:
    host, me = socket.gethostname(), os.getpid()
    if uri.create(url, f"{host} {me}\n".encode()):
        return
    theirs = (uri.read_if_there(url) or b"").decode().split()
    if len(theirs) == 2 and theirs[0] == host and not psutil.pid_exists(int(theirs[1])):
        uri.write(url, f"{host} {me}\n".encode())
        return
    who = f"process {theirs[1]} on {theirs[0]}" if len(theirs) == 2 else "somebody"
    raise DitflowError(f"{uri.redact(url)}: {who} is deleting, or was killed; wait, or delete this object if it was")


def wait(root: str) -> None:
    """Wait while somebody deletes.

    Raises:
        StorageError: the store does not answer.
    """
    folder = local_home(root) / FOLDER
    try:
        lock = os.open(folder / DELETING, os.O_RDONLY)
    except FileNotFoundError:  # nobody has deleted yet
        pass
    except OSError as error:
        LOGGER.warning("%s: cannot be read (%s); delete nothing while a flow runs", folder / DELETING, error.strerror)
    else:
        try:
            _lock(lock, fcntl.LOCK_SH, folder)
        finally:
            os.close(lock)
    marker, waited = processes.shared(root, DELETING), False
    while uri.local_path(root) is None and uri.exists(marker):
        if not waited:
            LOGGER.warning("waiting for `ditflow gc`; delete %s if it was killed", uri.redact(marker))
        waited = True
        time.sleep(POLL_SECONDS)


def _lock(file: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        LOGGER.warning("%s: waiting for `ditflow gc`", folder)
        fcntl.flock(file, kind)
    except OSError as error:
        LOGGER.warning("%s: no locks here (%s); delete nothing while a flow runs", folder, error.strerror)
