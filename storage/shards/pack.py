"""One tar: images of an archive, looked at and packed with their labels, in memory."""

import io
import tarfile
import time
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage import uri
from storage.archives.open import Archive, Member
from storage.config import Config
from storage.images.transforms import UnreadableImage, inspect
from storage.parallel import threads

TIMED_IMAGES = 256
"""Images that are read to see how fast that goes."""
_OWNER = "ditflow"
_SIZE, _CHECKSUM = slice(124, 135), slice(148, 155)  # of a header's bytes


class Unreadable(Config):
    """A file that was left out."""

    split: str
    """``train`` or ``held_out``."""
    name: str
    """Path below the archive."""
    reason: str
    """Why, in a few words."""


class Entry(Config):
    """One image of a tar, as its record lists it."""

    source_index: int
    """Position among the archive's sorted files."""
    name: str
    """Path below the archive."""
    label: int
    extension: str
    """The format: ``jpg``, ``png``."""


class Packed(NamedTuple):
    """A tar and what is in it."""

    data: bytes
    entries: tuple[Entry, ...]
    unreadable: tuple[Unreadable, ...]


def pack(source: Archive, split: str, indices: NDArray[np.int64], min_side: int) -> Packed:
    """Read images and make a webdataset tar of their own bytes, the same for the same images.

    Args:
        source: where they are.
        split: what to call it in the list of those left out.
        indices: positions among the archive's files, in the tar's order.
        min_side: shortest side of a usable image, pixels.

    Raises:
        StorageError: as `Archive.read`.
    """
    tar, entries, unreadable = io.BytesIO(), list[Entry](), list[Unreadable]()
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
    tar.write(bytes(2 * tarfile.BLOCKSIZE))  # the mark of the end
    tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE))
    return Packed(tar.getvalue(), tuple(entries), tuple(unreadable))


def packed_size(sizes: list[int]) -> int:
    """Bytes of images with their labels in a tar, but for its end: three headers' blocks and the data's, for each."""
    return tarfile.BLOCKSIZE * sum(3 - -size // tarfile.BLOCKSIZE for size in sizes)


def timed(archive: Archive, workers: int) -> tuple[float, float]:
    """Images a second read, checked and hashed, spread over the archive, and their mean size in bytes.

    Raises:
        StorageError: one cannot be read.
    """
    members = archive.members[:: max(1, len(archive.members) // TIMED_IMAGES)][:TIMED_IMAGES]

    def look(number: int) -> int:
        data = archive.read(members[number])
        with suppress(UnreadableImage):  # which the stage will list
            inspect(data)
        uri.sha256(data)  # as a part of its tar
        return len(data)

    begin = time.perf_counter()
    with threads(workers) as pool:
        sizes = list(pool.map(look, range(len(members))))
    return len(members) / (time.perf_counter() - begin), sum(sizes) / len(sizes)


def _add(tar: io.BytesIO, name: str, data: bytes) -> None:
    """A file of no time and no owner, headed as `tarfile` would, which takes ten times as long for it."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[_SIZE] = b"%011o" % len(data)
    header[_CHECKSUM] = b"%06o\0" % sum(header)
    tar.write(header)
    tar.write(data)
    tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def _blank() -> bytes:
    """The header of a file without a name, with spaces for its checksum, as it is summed."""
    info = tarfile.TarInfo()
    info.mode, info.uname, info.gname = 0o444, _OWNER, _OWNER
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header[:148] + b" " * 8 + header[156:]


def _entry(index: int, member: Member, data: bytes, min_side: int) -> Entry:
    facts = inspect(data)
    if min(facts.width, facts.height) < min_side:
        raise UnreadableImage(f"{facts.width}x{facts.height} pixels, smaller than {min_side}")
    return Entry(source_index=index, name=member.name, label=member.label, extension=facts.extension)


_HEADER = _blank()
