"""Objects that are written in pieces and hashed on the way."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from storage import uri


class Pieces:
    """An object that is written from beginning to end.

    Args:
        file: takes the pieces.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.size = 0
        """Bytes written."""
        self._file, self._digest = file, hashlib.sha256()

    def write(self, data: bytes | bytearray) -> None:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """SHA-256 of what is written, 64 hex digits."""
        return self._digest.hexdigest()


@contextmanager
def pieces(url: str, size: int) -> Iterator[Pieces]:
    """An object to write in pieces; it appears, complete, when the block ends without an error.

    Pieces go straight to the local disk. For another store they are collected in memory and sent in one call, which is
    made again while the store does not answer.

    Args:
        url: the object; any older one is replaced.
        size: bytes that will be written, or about as many, for the error if the disk is full.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    if uri.local_path(url) is None:
        buffer = io.BytesIO()
        yield Pieces(buffer)
        uri.write(url, buffer.getvalue())
        return
    with uri.writing(url, size) as file:
        yield Pieces(file)
