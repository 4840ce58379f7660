"""Packs images of an archive with their labels into one webdataset tar, and checks each image."""

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
from storage.pieces import Pieces

TIMED_IMAGES = 256
"""Images that are read to measure the rate."""
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


def timed(archive: Archive, workers: int) -> tuple[float, float]:
    """Measure images a second that are read, checked and hashed, and their mean size in bytes.

    The images are spread over the archive.

    Raises:
        StorageError: an image cannot be read.
    """
    members = archive.members[:: max(1, len(archive.members) // TIMED_IMAGES)][:TIMED_IMAGES]

    def process(number: int) -> int:
        data = archive.read(members[number])
        with suppress(UnreadableImage):  # the stage will list it
            inspect(data)
        uri.sha256(data)  # the stage hashes the whole tar
        return len(data)

    begin = time.perf_counter()
    with threads(workers) as pool:
        sizes = list(pool.map(process, range(len(members))))
    return len(members) / (time.perf_counter() - begin), sum(sizes) / len(sizes)


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
