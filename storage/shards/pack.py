"""Packs images of an archive with their labels into one webdataset tar, and checks each image."""

import io
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.archives.open import Archive, Member
from storage.config import Config
from storage.images.transforms import UnreadableImage, decode, inspect
from storage.order import permutation
from storage.parallel import threads
from storage.pieces import Pieces

_TIMED_IMAGES, _TIMED_TARS = 256, 16  # images of a round, and the tars that these are packed into
_TIMED_SECONDS = 0.5
_OWNER = "ditflow"
_SIZE, _CHECKSUM = slice(124, 135), slice(148, 155)  # bytes of a tar header


class Unreadable(Config):
    """A file that is not a usable image and was left out."""

    split: str
    """``train`` or ``held_out``."""
    name: str
    """Class name and path below the class."""
    reason: str
    """What is wrong with it, in a few words."""


class Entry(Config):
    """An image of a tar, as listed in the tar's record."""

    source_index: int
    """Index among the archive's sorted files."""
    name: str
    """Class name and path below the class."""
    label: int
    """Index of its class."""
    extension: str
    """File extension of its format, such as ``jpg``."""


class Packed(NamedTuple):
    """What a tar holds, and what was left out of it."""

    entries: tuple[Entry, ...]
    unreadable: tuple[Unreadable, ...]


def pack(tar: Pieces, source: Archive, split: str, indices: NDArray[np.int64], min_side: int) -> Packed:
    """Write a webdataset tar of images, with the image files' own bytes. The same images give the same tar.

    Args:
        tar: receives the tar, image by image.
        source: the archive.
        split: name of the split, for the list of unreadable files.
        indices: indices among the archive's files, in the tar's order.
        min_side: shortest side of a usable image, pixels.

    Raises:
        StorageError: as `Archive.read`.
    """
    entries, unreadable = list[Entry](), list[Unreadable]()
    for index in map(int, indices):
        member = source.members[index]
        data = source.read(member)
        try:
            entry = _entry(index, member, data, min_side)
        except UnreadableImage as error:
            unreadable.append(Unreadable(split=split, name=member.name, reason=str(error)))
            continue
        _add(tar, f"{index:08d}.cls", str(member.label).encode())
        _add(tar, f"{index:08d}.{entry.extension}", data)
        entries.append(entry)
    tar.write(bytes(2 * tarfile.BLOCKSIZE))  # end-of-archive mark
    tar.write(bytes(-tar.size % tarfile.RECORDSIZE))
    return Packed(tuple(entries), tuple(unreadable))


def packed_size(sizes: list[int]) -> int:
    """Bytes of images and labels in tars, without the tars' ends.

    Each image takes two headers, a block for its label, and the blocks of its data.
    """
    return tarfile.BLOCKSIZE * sum(3 - -size // tarfile.BLOCKSIZE for size in sizes)


class Timed(NamedTuple):
    """How fast this machine works on images of an archive, on all cores."""

    packed: float
    """Images read, checked, packed and hashed in a second."""
    decoded: float
    """Images read and decoded in a second."""
    size: float
    """Mean size of a file in bytes."""


def timed(archive: Archive, workers: int) -> Timed:
    """Measure images that are spread over the archive, in threads, for half a second each or until all are used.

    Raises:
        StorageError: an image cannot be read.
    """
    sizes = list[int]()

    def packed(indices: NDArray[np.int64]) -> None:
        pack(Pieces(io.BytesIO()), archive, "", indices, 1)

    def decoded(indices: NDArray[np.int64]) -> None:
        for index in indices.tolist():
            data = archive.read(archive.members[index])
            sizes.append(len(data))
            with suppress(UnreadableImage):  # the stage will list it
                decode(data)

    with threads(workers) as pool:
        order = permutation(0, 0, len(archive.members))
        return Timed(_speed(pool, packed, order), _speed(pool, decoded, order), sum(sizes) / len(sizes))


def _speed(pool: Executor, work: Callable[[NDArray[np.int64]], None], order: NDArray[np.int64]) -> float:
    """Images in a second."""
    begin, done = time.perf_counter(), 0
    while done < len(order) and time.perf_counter() - begin < _TIMED_SECONDS:
        some = order[done : done + _TIMED_IMAGES]
        list(pool.map(work, np.array_split(some, min(len(some), _TIMED_TARS))))
        done += len(some)
    return done / (time.perf_counter() - begin)


def _add(tar: Pieces, name: str, data: bytes) -> None:
    """Append a file without time and owner. The header is what `tarfile` writes, in a tenth of its time."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[_SIZE] = b"%011o" % len(data)
    header[_CHECKSUM] = b"%06o\0" % sum(header)
    tar.write(header)
    tar.write(data)
    tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def _blank() -> bytes:
    """A header without name and size; its checksum field holds spaces, as the sum is defined over them."""
    info = tarfile.TarInfo()
    info.mode, info.uname, info.gname = 0o444, _OWNER, _OWNER
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header[:148] + b" " * 8 + header[156:]


def _entry(index: int, member: Member, data: bytes, min_side: int) -> Entry:
    facts = inspect(data)
    if min(facts.width, facts.height) < min_side:
        raise UnreadableImage(f"{facts.width}x{facts.height} pixels, smaller than {min_side}")
    # constructed, since to validate it takes as long as to check the image
    return Entry.model_construct(source_index=index, name=member.name, label=member.label, extension=facts.extension)


_HEADER = _blank()
