"""Images alone in a tar, whose classes lie beside it: in a list, or in ImageNet's devkit as it is published.

Of a devkit nothing is unpacked to a disk, and no more than `LARGEST` bytes in memory.
"""

import gzip
import io
import struct
import zlib

from storage import uri
from storage.archives.listing import Archive, Found, first_line
from storage.archives.tars import Span, fetch, index, listed
from storage.errors import InputError

LARGEST = 1 << 26
"""Bytes of a devkit, packed or unpacked; the published one has a few million."""

_DEVKITS = (".tar.gz", ".tgz")
_META = "meta.mat"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_AGAIN = "fetch ILSVRC2012_devkit_t12.tar.gz again"
_MAT = slice(124, 128)  # a file's version and byte order
_MAT5 = b"\x00\x01IM"
_MAT_HEADER = 128
_COMPRESSED = 15  # the kind of an element


def open_flat(url: str, labels: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """A tar of images whose classes lie beside it.

    Args:
        url: of the tar.
        labels: URL of a text with one class name a line, in the order of the sorted file names, or of
            ImageNet's devkit (``.tar.gz``), whose ground truth is in that order too.
        class_names: the classes to label by.

    Raises:
        InputError: there are more classes than images or fewer, it is no such devkit, or as `open_tar`.
        StorageError: there is no such text or devkit.
    """
    fs, _ = uri.filesystem(url)
    where = uri.redact(url)
    (tar,), _ = listed(fs, [url])
    entries = sorted(tar.entries)
    lines = _devkit(labels) if uri.redact(labels).lower().endswith(_DEVKITS) else _lines(uri.read(labels))
    if len(lines) != len(entries):
        text = f"{len(lines):,} class names for the {len(entries):,} files of {where}"
        raise InputError(f"{uri.redact(labels)}: {text}; it needs one a line, in the order of the sorted names")
    found = [Found(line, entry.name, entry.span.size, entry.span) for line, entry in zip(lines, entries, strict=True)]
    return Archive(where, found, fetch(fs), class_names)


def _lines(text: bytes) -> list[str]:
    return [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]


def _devkit(url: str) -> list[str]:
    """The synsets of ImageNet's validation images, in the order of their names.

    Raises:
        InputError: it is not a devkit, or its two files do not fit each other; the line names it.
    """
    where = uri.redact(url)
    files = _files(where, _unpacked(where, url))
    synsets, numbers = _synsets(where, files[_META]), _lines(files[_TRUTH])
    for line, number in enumerate(numbers, 1):
        if number not in synsets:
            raise InputError(f"{where}: line {line:,} of {_TRUTH}: {number[:20]!a} is no class in {_META}; {_AGAIN}")
    return [synsets[number] for number in numbers]


def _unpacked(where: str, url: str) -> bytes:
    if (uri.size(url) or 0) <= LARGEST:
        try:
            with gzip.open(io.BytesIO(uri.read(url))) as packed:
                data = packed.read(LARGEST + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{where}: not a whole gzip file ({first_line(error)}); {_AGAIN}") from error
        if len(data) <= LARGEST:
            return data
    raise InputError(f"{where}: more than {LARGEST:,} bytes, where ImageNet's devkit has a few million; {_AGAIN}")


def _files(where: str, data: bytes) -> dict[str, bytes]:
    """The two files that tell the classes, wherever in the tar they lie."""
    tar = index(lambda _, start, size: data[start : start + size], where, Span(where, 0, len(data)))
    found = {}
    for name in (_META, _TRUTH):
        spans = [entry.span for entry in tar.entries if entry.name.rpartition("/")[2] == name]
        if len(spans) != 1:
            raise InputError(f"{where}: {len(spans)} files {name} in it instead of one; {_AGAIN}")
        found[name] = data[spans[0].start :][: spans[0].size]
    return found


def _synsets(where: str, meta: bytes) -> dict[str, str]:
    """The WNID of each class, by its ILSVRC2012_ID in digits. Inner nodes of WordNet's tree are no classes."""
    from scipy.io import loadmat  # a tenth of a second that nobody else needs

    try:
        _check_unpacked(meta)
        table = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        rows = zip(table["ILSVRC2012_ID"], table["WNID"], table["num_children"], strict=True)
        return {str(int(number)): str(wnid) for number, wnid, children in rows if children == 0}
    except Exception as error:  # what is damaged comes up as an error of any kind
        raise InputError(f"{where}: {_META} has no table of synsets ({first_line(error)}); {_AGAIN}") from error


def _check_unpacked(meta: bytes) -> None:
    """See that nothing in a MATLAB file grows beyond `LARGEST`, since its reader would take any size.

    Raises:
        ValueError: something does, or it is not such a file.
        struct.error, zlib.error: it is cut off or damaged.
    """
    if meta[_MAT] != _MAT5:
        raise ValueError("not a MATLAB file of version 5")
    at = _MAT_HEADER
    while at < len(meta):
        kind, size = struct.unpack_from("<II", meta, at)
        at += 8
        unpacker = zlib.decompressobj()
        if kind == _COMPRESSED and unpacker.decompress(meta[at : at + size], LARGEST) and unpacker.unconsumed_tail:
            raise ValueError(f"more than {LARGEST:,} bytes when unpacked")
        at += size
