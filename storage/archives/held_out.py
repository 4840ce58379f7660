"""A tar of images without class folders, whose classes are in a text file or in ImageNet's published devkit.

A devkit is unpacked in memory, never to a disk, and up to `MAX_DEVKIT_BYTES`.
"""

import codecs
import gzip
import io
import struct
import zlib

from storage import uri
from storage.archives.account import Account, is_image_name, shown
from storage.archives.listing import Archive, ListedFile, first_line
from storage.archives.tar_index import Span, index, list_tars, span_reader
from storage.errors import InputError
from storage.magic import stand_in

MAX_DEVKIT_BYTES = 1 << 26
"""Largest devkit in bytes, packed and unpacked; the published one has a few million."""

_DEVKITS = (".tar.gz", ".tgz")
_META = "meta.mat"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_FIX = "fetch ILSVRC2012_devkit_t12.tar.gz again"
_MAT_VERSION = slice(124, 128)  # bytes of the header with version and byte order
_MAT5 = b"\x00\x01IM"  # version 5, little-endian
_MAT_HEADER = 128
_COMPRESSED = 15  # type of a data element


def open_labelled_tar(url: str, labels: str, class_names: tuple[str, ...] | None = None) -> Archive:
    """A tar of images without class folders, with the labels from another file.

    Args:
        url: URL of the tar.
        labels: URL of a text file with one class name a line, in the order of the sorted file names; or
            of ImageNet's devkit (``.tar.gz``), whose ground truth has the same order.
        class_names: the classes of the training images.

    Raises:
        InputError: the numbers of labels and images differ, the devkit is damaged, or as `open_tar`.
        StorageError: the file with the labels is missing.
    """
    fs, _ = uri.filesystem(url)
    where = uri.redact(url)
    (tar,), _ = list_tars(fs, [url])
    account = Account(where)
    account.add(tar.account)
    entries = sorted(tar.entries)
    is_devkit = uri.redact(labels).lower().endswith(_DEVKITS)
    lines = _devkit(labels) if is_devkit else _lines(uri.redact(labels), uri.read(labels))
    if len(lines) != len(entries):
        others = [shown(entry.name) for entry in entries if not is_image_name(entry.name)]
        among = f" (one of them is {others[0]})" if others else ""
        counts = f"{len(lines):,} class names for the {len(entries):,} files of {where}{among}"
        raise InputError(f"{uri.redact(labels)}: {counts}; write one a line, in the order of the sorted file names")
    labelled = zip(lines, entries, strict=True)
    files = [ListedFile(line, entry.name, entry.span.size, entry.span) for line, entry in labelled]
    return Archive(account, files, span_reader(fs), class_names)


def _lines(where: str, text: bytes) -> list[str]:
    """The lines that are not empty.

    Raises:
        InputError: the text is something else, or neither UTF-8 nor UTF-16 that says so.
    """
    if (instead := stand_in(text)) is not None:
        raise InputError(f"{where}: {instead}")
    encoding = "utf-16" if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return [line.strip() for line in text.decode(encoding).splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text from byte {error.start:,} on; save it as UTF-8") from error


def _devkit(url: str) -> list[str]:
    """The synsets of ImageNet's validation images, in the order of their names.

    Raises:
        InputError: the file is not a devkit, or its two files do not match; the line names the devkit.
    """
    where = uri.redact(url)
    files = _files(where, _unpacked(where, url))
    synsets, numbers = _synsets(where, files[_META]), _lines(f"{where}/{_TRUTH}", files[_TRUTH])
    for line, number in enumerate(numbers, 1):
        if number not in synsets:
            raise InputError(f"{where}: line {line:,} of {_TRUTH}: {number[:20]!a} is not a class in {_META}; {_FIX}")
    return [synsets[number] for number in numbers]


def _unpacked(where: str, url: str) -> bytes:
    if (uri.size(url) or 0) <= MAX_DEVKIT_BYTES:
        try:
            with gzip.open(io.BytesIO(uri.read(url))) as packed:
                data = packed.read(MAX_DEVKIT_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            damage = f"damaged or not a gzip file ({first_line(error)}); {_FIX}"
            raise InputError(f"{where}: {uri.stand_in(url) or damage}") from error
        if len(data) <= MAX_DEVKIT_BYTES:
            return data
    raise InputError(f"{where}: more than {MAX_DEVKIT_BYTES:,} bytes, too large for ImageNet's devkit; {_FIX}")


def _files(where: str, data: bytes) -> dict[str, bytes]:
    """The two files that define the classes, from any folder of the tar."""
    tar = index(lambda _, start, size: data[start : start + size], where, Span(where, 0, len(data)))
    files = {}
    for name in (_META, _TRUTH):
        spans = [entry.span for entry in tar.entries if entry.name.rpartition("/")[2] == name]
        if len(spans) != 1:
            raise InputError(f"{where}: {len(spans)} files {name} instead of one; {_FIX}")
        files[name] = data[spans[0].start :][: spans[0].size]
    return files


def _synsets(where: str, meta: bytes) -> dict[str, str]:
    """The WNID of each class by its ILSVRC2012_ID in digits. Inner nodes of WordNet's tree are not classes."""
    from scipy.io import loadmat  # here, since the import takes a tenth of a second

    try:
        _check_unpacked(meta)
        table = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        rows = zip(table["ILSVRC2012_ID"], table["WNID"], table["num_children"], strict=True)
        return {str(int(number)): str(wnid) for number, wnid, children in rows if children == 0}
    except Exception as error:  # damaged files raise errors of any type
        raise InputError(f"{where}: {_META} has no table of synsets ({first_line(error)}); {_FIX}") from error


def _check_unpacked(meta: bytes) -> None:
    """Check that no element of a MATLAB file unpacks to more than `MAX_DEVKIT_BYTES`; scipy has no such limit.

    Raises:
        ValueError: an element does, or this is not a MATLAB file of version 5.
        struct.error, zlib.error: the file is truncated or damaged.
    """
    if meta[_MAT_VERSION] != _MAT5:
        raise ValueError("not a MATLAB file of version 5")
    position = _MAT_HEADER
    while position < len(meta):
        kind, size = struct.unpack_from("<II", meta, position)
        position += 8
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacker.decompress(meta[position : position + size], MAX_DEVKIT_BYTES)
            if unpacker.unconsumed_tail:
                raise ValueError(f"more than {MAX_DEVKIT_BYTES:,} bytes when unpacked")
        position += size
