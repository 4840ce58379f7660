"""Whether the root and this machine's cache keep what the stages rely on: the checks of ``ditflow doctor`` on files."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psutil

from storage import uri
from storage.finding import Finding, failed, ok, skipped, warning
from storage.parallel import cores
from storage.rows import cache

CREATORS = 8
WRITES = 10
"""Small objects whose writing is timed."""
SLOW_WRITE = 1.0
"""Seconds of a small object that delay training: it commits several at each checkpoint."""
LOW_BYTES = 10 * 10**9
"""Free space that one checkpoint of a large model can fill."""
TRIAL_BYTES = 2**26
SLOW_CACHE = 50e6
"""Bytes a second of a disk to which copies of remote stores are written."""
SKEW_SECONDS, S3_SKEW_SECONDS = 5.0, 900.0
"""Difference of clocks that muddles times, and the one at which S3 refuses requests."""
NETWORK_DISKS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "glusterfs")


def root(root: str) -> Finding:
    """Exclusive creation, replacement, reading, listing and removal of objects in the root."""
    with _trial(root) as folder:
        first = uri.join(folder, "first")
        created, again = uri.create(first, b"first"), uri.create(first, b"second")
        if not created or again or uri.read(first) != b"first":
            return failed(f"{uri.redact(root)}: an object that exists can be created again", _ANOTHER)
        shared = uri.join(folder, "shared")
        with ThreadPoolExecutor(CREATORS) as pool:
            winners = sum(pool.map(lambda number: uri.create(shared, str(number).encode()), range(CREATORS)))
        if winners != 1:
            return failed(f"{uri.redact(root)}: {winners} of {CREATORS} creators of one object succeeded", _ANOTHER)
        before = uri.version(first)
        uri.write(first, b"replaced, longer")
        if uri.read(first) != b"replaced, longer" or uri.version(first) == before:
            return failed(f"{uri.redact(root)}: a replaced object is read as it was before", _ANOTHER)
        pieces = uri.join(folder, "pieces")
        with uri.writing(pieces, 3) as file:
            file.write(b"abc")
        if uri.read_ranges([pieces], [1], [3]) != [b"bc"] or uri.names(folder) != ["first", "pieces", "shared"]:
            return failed(f"{uri.redact(root)}: an object is not listed, or not read, as it was written", _ANOTHER)
        seconds = sorted(_timed(lambda: uri.write(first, b"x" * 4096)) for _ in range(WRITES))[WRITES // 2]
    seen = (
        f"{uri.redact(root)}: creates exclusively, replaces, lists and removes; {1000 * seconds:.0f} ms a small object"
    )
    if seconds > SLOW_WRITE:
        return warning(seen, "choose a root that is nearer: each stage writes thousands of objects")
    home = uri.local_path(root)
    if home is not None and not _has_locks(home):
        return warning(f"{seen}; but locks no files", "runs that a kill leaves open stay so: mount the root with locks")
    return _with_room(seen, home)


_ANOTHER = "choose another root: outputs are committed by creating objects that nobody else can create"


def clock(root: str) -> Finding:
    """This machine's clock against that of the root's store."""
    with _trial(root) as folder:
        url = uri.join(folder, "clock")
        fs, path = uri.filesystem(url)
        begin = time.time()
        uri.write(url, b"")
        end = time.time()
        try:
            told = fs.modified(path)
        except NotImplementedError:
            return skipped(f"{uri.redact(root)} tells no times")
    stamp = (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()
    skew = max(begin - stamp - 1, stamp - end - 1, 0.0)  # some stores tell whole seconds
    seen = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC here, {skew:.0f} s from the clock of {uri.redact(root)}"
    remedy = "let chrony or ntpd set the clock (timedatectl)"
    if skew > S3_SKEW_SECONDS:
        return failed(f"{seen}, and S3 refuses more than {S3_SKEW_SECONDS:.0f} s", remedy)
    return warning(seen, remedy) if skew > SKEW_SECONDS else ok(seen)


def cache_disk() -> Finding:
    """Room, speed and locks of the folder with copies of remote stores and compiled code."""
    place = cache.root()
    trial = place / f"doctor-{uuid4().hex}"
    with cache.locked(trial):
        try:
            seconds = _timed(lambda: uri.write(str(trial), os.urandom(TRIAL_BYTES)))
            data = uri.read(str(trial))
        finally:
            trial.unlink(missing_ok=True)
            trial.with_name(f"{trial.name}.lock").unlink()
    speed = len(data) / seconds
    kind = _kind(place)
    seen = f"{place} ({kind}): written at {speed / 1e6:,.0f} MB/s"
    if kind.startswith(NETWORK_DISKS):
        return warning(seen, "set XDG_CACHE_HOME to a folder on a disk of this machine: training reads from it")
    if speed < SLOW_CACHE:
        return warning(seen, "set XDG_CACHE_HOME to a folder on a faster disk")
    return _with_room(seen, place)


def machine() -> Finding:
    """Cores, memory, and room for what processes share and for temporary files."""
    seen = f"{cores()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB of memory"
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        seen += f", {size / 2**30:.1f} GiB shared in {shared}"
        if size < 2**30:
            remedy = "start the container with --shm-size=8g or --ipc=host: NCCL's ranks talk through it"
            return warning(seen, remedy)
    return ok(seen)


@contextmanager
def _trial(root: str) -> Iterator[str]:
    """A folder in the root for the length of the block, which no other process uses."""
    folder = uri.join(root, f".doctor-{uuid4().hex}")
    try:
        yield folder
    finally:
        uri.remove_tree(folder, within=root)


def _with_room(seen: str, place: Path | None) -> Finding:
    """All is well, unless the disk is nearly full."""
    if place is None:
        return ok(seen)
    free = shutil.disk_usage(place).free
    seen += f"; {cache.gigabytes(free)} free"
    return ok(seen) if free > LOW_BYTES else warning(seen, "make room: a checkpoint of DiT-XL/2 has 8 GB")


def _has_locks(folder: Path) -> bool:
    import fcntl  # not on Windows

    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _kind(place: Path) -> str:
    """The type of the file system of a folder."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (place, *place.parents) if parent in mounts), "unknown")


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
