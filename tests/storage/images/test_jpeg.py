"""What the markers tell is what Pillow finds by decoding."""

import io
import random
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from storage.images import jpeg
from storage.images.jpeg import complete
from storage.images.transforms import MAX_ASPECT, UnreadableImage, decode, inspect


def encoded(mode: str = "RGB", size: tuple[int, int] = (61, 45), **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


PLAIN = {
    "colour": encoded(),
    "grey": encoded("L"),
    "best": encoded(quality=95, subsampling=0),
    "halved": encoded(quality=30, subsampling=1),
    "optimized": encoded(optimize=True),
    "restarts": encoded(restart_marker_blocks=3),
    "commented": encoded(comment=b"x" * 300),
}
OTHER = {"progressive": encoded(progressive=True), "inks": encoded("CMYK"), "png": b"\x89PNG\r\n\x1a\n", "none": b""}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_are_checked_without_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = decode(PLAIN[name])
    monkeypatch.setattr(Image, "open", None)
    facts = inspect(PLAIN[name])
    assert (facts.width, facts.height, facts.extension) == (*image.size, "jpg")
    assert complete(PLAIN[name] + b"what a camera appends")


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xEB, 0xED, 0xEE])
@pytest.mark.parametrize(
    "text", [b"JFIF\0\1", b"Exif\0\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0" + bytes(20), b"Adobe\0"]
)
def test_only_segments_that_pillow_may_parse_are_left_to_it(marker: int, text: bytes) -> None:
    segment = bytes((0xFF, marker)) + (len(text) + 2).to_bytes(2) + text
    data = PLAIN["colour"][:2] + segment + PLAIN["colour"][2:]
    found = complete(data)
    assert found
    assert found.is_bare == (marker in (0xE0, 0xEE) and len(text) >= 12)
    try:
        image = Image.open(io.BytesIO(data))
    except Exception:
        assert not found.is_bare
        with pytest.raises(UnreadableImage):
            inspect(data)
        return
    facts = inspect(data)
    assert (facts.width, facts.height) == image.size


def test_the_size_of_a_plain_jpeg_is_limited() -> None:
    frame = PLAIN["colour"].index(b"\xff\xc0")
    for width, height in ((10_000, 10_000), (3000, 50)):
        sized = height.to_bytes(2) + width.to_bytes(2)
        data = PLAIN["colour"][: frame + 5] + sized + PLAIN["colour"][frame + 9 :]
        assert complete(data) == (width, height, True)
        with pytest.raises(UnreadableImage, match=f"{width}x{height} pixels"):
            inspect(data)


@pytest.mark.parametrize("name", OTHER)
def test_other_jpegs_are_decoded(name: str) -> None:
    assert complete(OTHER[name]) is None


@pytest.mark.parametrize("name", PLAIN)
def test_every_truncation_is_found(name: str) -> None:
    data = PLAIN[name]
    assert not any(complete(data[:end]) for end in range(len(data)))
    for end in range(0, len(data), 97):
        with pytest.raises(UnreadableImage):
            inspect(data[:end])


def damaged(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Bytes changed, dropped, doubled or moved, more often near the headers."""
    while True:
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(rng.choice((30, 700, len(broken))))
            at, length = min(at, len(broken) - 1), rng.choice((1, 1, 2, 20, 200))
            match rng.randrange(5):
                case 0:
                    broken[at] = rng.randrange(256)
                case 1:
                    broken[at] ^= 1 << rng.randrange(8)
                case 2:
                    del broken[at : at + length]
                case 3:
                    broken[at:at] = broken[at : at + length]
                case _:
                    broken[at : at + 2] = bytes((0xFF, rng.choice((0xC0, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0))))
            if not broken:
                break
        yield bytes(broken)


@pytest.mark.parametrize("name", PLAIN)
def test_a_jpeg_called_complete_always_decodes(name: str) -> None:
    rng = random.Random(name)
    count = 0
    for _, data in zip(range(1500), damaged(PLAIN[name], rng), strict=False):
        if found := complete(data):
            count += 1
            try:
                facts = inspect(data)
            except UnreadableImage:  # Pillow does not even open it, or it is too thin
                assert not found.is_bare or max(found[:2]) > MAX_ASPECT * min(found[:2])
                continue
            assert decode(data).size == (facts.width, facts.height) == found[:2]
    assert count > 100


def test_a_jpeg_with_wrong_huffman_tables_is_not_complete() -> None:
    data = PLAIN["colour"]
    table = data.index(b"\xff\xc4")
    oversubscribed = data[: table + 5] + b"\x03" + data[table + 6 :]
    assert complete(oversubscribed) is None
    assert jpeg._huffman(bytes([0, 1, 0, 2, *[0] * 13, 0, 1, 2])) == {0}
    assert jpeg._huffman(bytes([0, 1, 2, *[0] * 14, 0, 1, 2])) is None  # a code of all ones
    assert jpeg._huffman(bytes([0, 1, 0, 2, *[0] * 13, 0, 1, 16])) is None  # a difference of 16 bits
