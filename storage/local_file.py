"""Local files that appear whole or not at all."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links answer, such as FAT and some of FUSE."""


@contextmanager
def local_file(path: Path, *, exclusive: bool) -> Iterator[IO[bytes]]:
    """A temporary file that is renamed to the path if the block ends without an error, and removed otherwise."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _move_to_new(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _move_to_new(temporary: Path, path: Path) -> None:
    """Give a file its name, or raise FileExistsError if the name is taken."""
    try:
        os.link(temporary, path)  # unlike a rename, fails if the path exists
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        import fcntl  # not on Windows

        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # against all who create here in this way; a kill frees it
            if path.exists():
                raise FileExistsError(errno.EEXIST, "File exists", str(path)) from error
            temporary.replace(path)
        finally:
            os.close(folder)
