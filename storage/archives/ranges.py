"""Byte ranges of the files of a store."""

import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TypeAlias

import fsspec
from fsspec.implementations.local import LocalFileSystem

Read: TypeAlias = Callable[[str, int, int], bytes]
"""Returns bytes of an object, given its path, the first byte and their number."""

_OPEN_FILES = 64  # local files that are kept open


def reader(fs: fsspec.AbstractFileSystem) -> Read:
    """A function that reads a range of an object. Local files stay open, since opening takes longer than reading."""
    if not isinstance(fs, LocalFileSystem):
        return lambda path, start, size: bytes(fs.cat_file(path, start=start, end=start + size))
    opened = lru_cache(maxsize=_OPEN_FILES)(partial(open, mode="rb", buffering=0))

    def read(path: str, start: int, size: int) -> bytes:
        file = opened(path)  # this reference keeps it open if the cache drops it meanwhile
        return os.pread(file.fileno(), size, start)

    return read
