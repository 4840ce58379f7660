"""Checks from its markers, without decoding it, that a JPEG can be decoded.

ITU-T T.81, annex B. A decoder fails on a baseline JPEG only if its headers are wrong or its data ends
too early: the entropy-coded data of a scan, however damaged, always decodes to some picture.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

_FRAME, _HUFFMAN, _END, _SCAN, _QUANTIZATION, _RESTART_INTERVAL = 0xC0, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD
_COMMENT, _JFIF_ADOBE, _WHOLE = 0xFE, (0xE0, 0xEE), 12  # APP0 and APP14, and their bytes at least
_SKIPPED = frozenset({*range(0xE0, 0xF0), _COMMENT})  # APPn and comments
_IN_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # a marker that is neither a stuffed byte nor a restart
_HUFFMAN_TABLES = frozenset({*range(4), *range(0x10, 0x14)})  # class and number: DC 0 to 3, AC 0 to 3
_SAMPLINGS = ((0x11,), (0x11, 0x11, 0x11), (0x21, 0x11, 0x11), (0x12, 0x11, 0x11), (0x22, 0x11, 0x11))


class Jpeg(NamedTuple):
    """What the markers of a complete JPEG say."""

    width: int
    height: int
    is_bare: bool
    """Whether it holds nothing beside the picture but comments and the headers of JFIF and Adobe: no reader parses more
    of it than this module does."""


def complete(data: bytes) -> Jpeg | None:
    """The facts of a complete baseline JPEG, grey or of three components, with a single scan; None if it is none.

    If it is None, the file may still be a complete JPEG of another type: only decoding can tell.
    """
    defined, frame, is_bare = set[int](), b"", True
    for marker, segment, after in _segments(data):
        if marker in (_QUANTIZATION, _HUFFMAN) and (tables := _tables(marker, segment)) is not None:
            defined |= tables
        elif marker == _FRAME and not frame and _plain_frame(segment):
            frame = segment
        elif marker == _SCAN:
            if not (_plain_scan(segment, frame[6:], defined) and _ends(data, after)):
                return None
            return Jpeg(int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3]), is_bare)
        elif marker in _SKIPPED:
            is_bare &= marker == _COMMENT or (marker in _JFIF_ADOBE and len(segment) >= _WHOLE)
        elif not (marker == _RESTART_INTERVAL and len(segment) == 2):
            return None
    return None


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, contents and end of each segment, up to the first damaged one."""
    start = 2
    if data[:2] != b"\xff\xd8":
        return
    while len(data) >= start + 4 and data[start] == 0xFF:
        size = int.from_bytes(data[start + 2 : start + 4])
        end = start + 2 + size
        if size < 2 or end > len(data):
            return
        yield data[start + 1], data[start + 4 : end], end
        start = end


@lru_cache(maxsize=64)  # most files have the same tables
def _tables(marker: int, segment: bytes) -> set[int] | None:
    return _quantization(segment) if marker == _QUANTIZATION else _huffman(segment)


def _quantization(segment: bytes) -> set[int] | None:
    """The quantization tables that a segment defines, as 0x100 + number; None if it is damaged or has 16 bits."""
    if len(segment) % 65 or any(number > 3 for number in segment[::65]):
        return None
    return {0x100 + number for number in segment[::65]}


def _huffman(segment: bytes) -> set[int] | None:
    """The Huffman tables that a segment defines, as class and number; None if one is not a prefix code."""
    tables = set[int]()
    while segment:
        table, counts = segment[0], segment[1:17]
        total = sum(counts)
        symbols = segment[17 : 17 + total]
        used = sum(count << (16 - length) for length, count in enumerate(counts, 1))  # of all codes of 16 bits
        if table not in _HUFFMAN_TABLES or not 0 < total == len(symbols) <= 256:
            return None
        # the code of all ones is reserved, and a DC difference has at most 15 bits
        if used >= 1 << 16 or (table < 0x10 and max(symbols) > 15):
            return None
        tables.add(table)
        segment = segment[17 + total :]
    return tables


def _plain_frame(segment: bytes) -> bool:
    """Whether a frame has eight bits, some pixels, and one or three components with a common sampling."""
    if len(segment) < 9 or segment[0] != 8 or len(segment) != 6 + 3 * segment[5]:
        return False
    if not any(segment[1:3]) or not any(segment[3:5]):
        return False
    return tuple(segment[7::3]) in _SAMPLINGS and len(set(segment[6::3])) == segment[5]


def _plain_scan(segment: bytes, components: bytes, defined: set[int]) -> bool:
    """Whether a scan holds all components of the frame, in its order, and all their tables are defined."""
    count = len(components) // 3
    if not count or len(segment) != 4 + 2 * count or segment[0] != count or segment[1:-3:2] != components[::3]:
        return False
    tables = segment[2:-3:2]
    needed = {pair >> 4 for pair in tables} | {0x10 | pair & 15 for pair in tables}
    return defined >= needed | {0x100 + number for number in components[2::3]}


def _ends(data: bytes, scan: int) -> bool:
    """Whether the first marker in the scan's data is the end of the image."""
    marker = _IN_SCAN.search(data, scan)
    return marker is not None and data[marker.start() + 1] == _END
