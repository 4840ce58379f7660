"""Whether a JPEG can be decoded, told from its markers, without decoding it.

ITU-T T.81, annex B. A decoder fails on a baseline JPEG only where its headers are wrong or its data
ends too soon: what lies between a scan's markers is always some picture, however damaged.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

_SOF, _HUFFMAN, _EOI, _SCAN, _QUANTA, _INTERVAL = 0xC0, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD
_SKIPPED = frozenset({*range(0xE0, 0xF0), 0xFE})  # application data and comments
_IN_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # a marker that is neither stuffing nor a restart
_CODES = frozenset({*range(4), *range(0x10, 0x14)})  # of DC, of AC
_SAMPLINGS = ((0x11,), (0x11, 0x11, 0x11), (0x21, 0x11, 0x11), (0x12, 0x11, 0x11), (0x22, 0x11, 0x11))


def is_whole(data: bytes) -> bool:
    """Whether this is a plain baseline JPEG, grey or of three components in one scan, whole to its last marker.

    False says nothing but that decoding must tell: a JPEG of another kind may well be whole.
    """
    defined, components = set[int](), b""
    for marker, segment, after in _segments(data):
        if marker in (_QUANTA, _HUFFMAN) and (tables := _tables(marker, segment)) is not None:
            defined |= tables
        elif marker == _SOF and not components and _plain_frame(segment):
            components = segment[6:]
        elif marker == _SCAN:
            return _plain_scan(segment, components, defined) and _ends(data, after)
        elif marker not in _SKIPPED and not (marker == _INTERVAL and len(segment) == 2):
            return False
    return False


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, content and the byte behind it of the segments, up to the first that is not one."""
    at = 2
    if data[:2] != b"\xff\xd8":
        return
    while len(data) >= at + 4 and data[at] == 0xFF:
        size = int.from_bytes(data[at + 2 : at + 4])
        end = at + 2 + size
        if size < 2 or end > len(data):
            return
        yield data[at + 1], data[at + 4 : end], end
        at = end


@lru_cache(maxsize=64)  # most files have those of the standard
def _tables(marker: int, segment: bytes) -> set[int] | None:
    return _quanta(segment) if marker == _QUANTA else _huffman(segment)


def _quanta(segment: bytes) -> set[int] | None:
    """The tables that a segment defines, as 0x100 + number; None if it is damaged or of 16 bits."""
    if len(segment) % 65 or any(number > 3 for number in segment[::65]):
        return None
    return {0x100 + number for number in segment[::65]}


def _huffman(segment: bytes) -> set[int] | None:
    """The tables that a segment defines, as class and number; None if one is no prefix code."""
    found = set[int]()
    while segment:
        which, counts = segment[0], segment[1:17]
        total = sum(counts)
        symbols = segment[17 : 17 + total]
        used = sum(count << (16 - length) for length, count in enumerate(counts, 1))
        if which not in _CODES or not 0 < total == len(symbols) <= 256:
            return None
        if used >= 1 << 16 or (which < 0x10 and max(symbols) > 15):  # no code is all ones; a DC is of 15 bits at most
            return None
        found.add(which)
        segment = segment[17 + total :]
    return found


def _plain_frame(segment: bytes) -> bool:
    """Eight bits, some pixels, and grey or three components sampled as usual."""
    if len(segment) < 9 or segment[0] != 8 or len(segment) != 6 + 3 * segment[5]:
        return False
    if not any(segment[1:3]) or not any(segment[3:5]):
        return False
    return tuple(segment[7::3]) in _SAMPLINGS and len(set(segment[6::3])) == segment[5]


def _plain_scan(segment: bytes, components: bytes, defined: set[int]) -> bool:
    """All components of the frame, in its order, each with the tables that it needs."""
    count = len(components) // 3
    if not count or len(segment) != 4 + 2 * count or segment[0] != count or segment[1:-3:2] != components[::3]:
        return False
    tables = segment[2:-3:2]
    needed = {pair >> 4 for pair in tables} | {0x10 | pair & 15 for pair in tables}
    return defined >= needed | {0x100 + number for number in components[2::3]}


def _ends(data: bytes, scan: int) -> bool:
    """Whether the first marker in the scan's data is that of the image's end."""
    marker = _IN_SCAN.search(data, scan)
    return marker is not None and data[marker.start() + 1] == _EOI
