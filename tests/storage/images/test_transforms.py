import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from storage.images.transforms import Facts, UnreadableImage, center_crop, decode, fast_crop, inspect, load, load_fast

Encode = Callable[..., bytes]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def box_halved(pixels: np.ndarray) -> np.ndarray:
    """The mean of each 2x2 cell, rounded half up, horizontal means first rounded as Pillow's two passes do."""
    height, width = pixels.shape[:2]
    across = (pixels.reshape(height, width // 2, 2, 3).astype(int).sum(2) + 1) // 2
    return ((across.reshape(height // 2, 2, width // 2, 3).sum(1) + 1) // 2).astype(np.uint8)


def test_crop_of_a_multiple_is_a_mean_of_cells() -> None:
    pixels = noise(32, 48)
    halved = box_halved(box_halved(pixels))  # 8 x 12
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), halved[:, 2:10])


@pytest.mark.parametrize(
    ("height", "width", "size"), [(50, 37, 16), (33, 91, 16), (64, 64, 16), (20, 31, 16), (9, 8, 16)]
)
def test_crop_against_pillows_own_box(height: int, width: int, size: int) -> None:
    """One resize from the exact source box replaces resize and cut: equal up to the edge's rounding."""
    image = Image.fromarray(noise(height, width, seed=height))
    halvings = 0
    while min(height, width) >> (halvings + 1) >= size:
        halvings += 1
    for _ in range(halvings):
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    new = (round(image.size[0] * scale), round(image.size[1] * scale))
    x, y = (new[0] - size) // 2, (new[1] - size) // 2
    sx, sy = image.size[0] / new[0], image.size[1] / new[1]
    box = (x * sx, y * sy, (x + size) * sx, (y + size) * sy)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(int)
    cropped = center_crop(Image.fromarray(noise(height, width, seed=height)), size)
    assert cropped.shape == (size, size, 3)
    assert cropped.dtype == np.uint8
    inner = np.abs(cropped.astype(int) - expected)[2:-2, 2:-2]  # at a box's edge the filter sees no further
    assert inner.max() <= 1


def bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """Rows scaled to a size by the cubic filter (a = -0.5), widened when they shrink, and rounded to bytes."""
    old = len(pixels)
    scale = old / size
    away = np.abs((np.arange(old) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / max(scale, 1))
    near, far = (1.5 * away - 2.5) * away**2 + 1, ((-0.5 * away + 2.5) * away - 4) * away + 2
    weights = np.select([away < 1, away < 2], [near, far])
    weights /= weights.sum(1, keepdims=True)
    return np.tensordot(weights, pixels, 1).clip(0, 255).round()


@pytest.mark.parametrize(("height", "width"), [(78, 19), (30, 20), (20, 78), (90, 12)])
def test_every_image_is_scaled_horizontally_first(height: int, width: int) -> None:
    """Whatever Pillow thinks is faster: the bytes between the two passes make tens of levels of difference."""
    pixels, scale = noise(height, width).astype(float), 16 / min(height, width)
    across = bicubic(pixels.swapaxes(0, 1), round(width * scale)).swapaxes(0, 1)
    expected = bicubic(across, round(height * scale))
    top, left = (expected.shape[0] - 16) // 2, (expected.shape[1] - 16) // 2
    found = center_crop(Image.fromarray(noise(height, width)), 16)
    assert np.abs(found - expected[top : top + 16, left : left + 16]).max() <= 1


def smooth(height: int, width: int) -> np.ndarray:
    """Waves in three colours, some of them clipped."""
    y, x = np.mgrid[:height, :width][..., None] / np.array([7.0, 11.0, 17.0])
    return (127.5 + 160 * np.sin(x + 2) * np.cos(y)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("make", [noise, smooth])
@pytest.mark.parametrize("size", [16, 64])
def test_fast_crop_is_the_reference_within_a_level(make: Callable[[int, int], np.ndarray], size: int) -> None:
    sides = np.random.default_rng(size).integers(size // 2, 5 * size, (60, 2))  # both halved and enlarged
    apart = []
    for height, width in sides.tolist():
        image = Image.fromarray(make(height, width))
        found, expected = (crop(image, size).astype(int) for crop in (fast_crop, center_crop))
        assert found.shape == (size, size, 3)
        apart.append(np.abs(found - expected))
    assert np.max(apart) <= 2  # two where the roundings of both passes meet, one pixel of millions
    assert np.mean(np.array(apart) > 1) < 1e-5
    assert np.mean(apart) < 0.001


@pytest.mark.parametrize("width", [40, 64, 128])
def test_fast_crop_is_exact_where_positions_are(width: int) -> None:
    """Sides that are powers of two times the size's, so that no rounding comes in."""
    image = Image.fromarray(noise(32, width))
    for size in (8, 16, 32):
        assert np.array_equal(fast_crop(image, size), center_crop(image, size))


@pytest.mark.parametrize("crop", [center_crop, fast_crop])
def test_crop_does_not_change_an_image_of_its_size(crop: Callable[[Image.Image, int], np.ndarray]) -> None:
    pixels = noise(16, 16)
    assert np.array_equal(crop(Image.fromarray(pixels), 16), pixels)


def test_crop_of_one_pixel_is_flat() -> None:
    assert (center_crop(Image.new("RGB", (1, 1), (9, 8, 7)), 4) == [9, 8, 7]).all()


def test_load_decodes_and_crops(encode_image: Encode) -> None:
    pixels = noise(16, 24)
    assert np.array_equal(load(encode_image(pixels), 16), pixels[:, 4:20])
    assert np.array_equal(load_fast(encode_image(pixels), 16), pixels[:, 4:20])


def test_lossless_rgb_comes_through(encode_image: Encode) -> None:
    pixels = noise(12, 9)
    assert np.array_equal(np.asarray(decode(encode_image(pixels))), pixels)
    assert inspect(encode_image(pixels)) == Facts(9, 12, "png")


@pytest.mark.parametrize(
    ("form", "extension"),
    [("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif"), ("PPM", "ppm")],
)
def test_extension_follows_the_bytes(encode_image: Encode, form: str, extension: str) -> None:
    assert inspect(encode_image(noise(8, 8), form)).extension == extension


def test_a_jpeg_followed_by_more_images_is_a_jpeg() -> None:
    buffer = io.BytesIO()
    first, second = (Image.fromarray(noise(8, 8, seed=seed)) for seed in (0, 1))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(buffer.getvalue())).format == "MPO"
    assert inspect(buffer.getvalue()) == Facts(8, 8, "jpg")


def test_grey_and_alpha_become_rgb(encode_image: Encode) -> None:
    grey = noise(8, 8, 1)
    assert np.array_equal(np.asarray(decode(encode_image(grey))), np.stack([grey] * 3, axis=-1))
    transparent = noise(8, 8, 4)
    assert np.array_equal(np.asarray(decode(encode_image(transparent))), transparent[..., :3])
    grey_alpha = noise(8, 8, 2)
    assert np.array_equal(np.asarray(decode(encode_image(grey_alpha))), np.repeat(grey_alpha[..., :1], 3, axis=-1))


def test_palette_becomes_rgb() -> None:
    image = Image.fromarray(noise(8, 8)).quantize(16)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    palette = np.array(image.getpalette()).reshape(-1, 3)
    assert np.array_equal(np.asarray(decode(buffer.getvalue())), palette[np.asarray(image)])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_palette_with_alpha_keeps_its_colours_under_it() -> None:
    image = Image.fromarray(noise(8, 8)).quantize(16)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(range(16)))
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    assert (opened.mode, "transparency" in opened.info) == ("P", True)
    palette = np.array(image.getpalette()).reshape(-1, 3)
    assert np.array_equal(np.asarray(decode(buffer.getvalue())), palette[np.asarray(image)])


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_used(form: str) -> None:
    first, second = (Image.new("RGB", (9, 8), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    buffer = io.BytesIO()
    first.save(buffer, form, save_all=True, append_images=[second])
    assert getattr(Image.open(io.BytesIO(buffer.getvalue())), "n_frames", 1) == 2
    pixels = np.asarray(decode(buffer.getvalue())).astype(int)
    assert pixels.shape == (8, 9, 3)
    assert np.abs(pixels - (255, 0, 0)).max() <= 2


def test_sixteen_bits_of_colour_become_eight_by_their_upper_half() -> None:
    deep = np.random.default_rng(0).integers(0, 1 << 16, (8, 8, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)  # no filter
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)) + body
    assert np.array_equal(np.asarray(decode(data)), deep // 256)


def test_cmyk_becomes_rgb_as_pillow_does() -> None:
    image = Image.fromarray(np.full((8, 8, 4), (0, 255, 255, 0), np.uint8), mode="CMYK")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    pixels = np.asarray(decode(buffer.getvalue()))
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")))
    assert (pixels[..., 0] > 245).all()
    assert (pixels[..., 1:] < 10).all()


def test_sixteen_bits_of_grey_keep_their_range(encode_image: Encode) -> None:
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.stack([deep // 256] * 3, axis=-1)
    for form in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decode(encode_image(deep, form))), expected)


def test_exif_does_not_turn_the_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 20)).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).size == (20, 8)


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(encode_image: Encode, form: str, share: float) -> None:
    whole = encode_image(noise(64, 64), form)
    with pytest.raises(UnreadableImage):
        decode(whole[: int(len(whole) * share)])


def test_a_flipped_bit_in_a_png_is_refused(encode_image: Encode) -> None:
    data = bytearray(encode_image(noise(64, 64), compress_level=0))
    data[len(data) // 2] ^= 1  # a pixel of an uncompressed stream: only a checksum can tell
    with pytest.raises(UnreadableImage):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not a picture at all", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript is not supported"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not supported"),
        (bomb(), "pixels"),
    ],
)
def test_reasons_are_short_and_stable(data: bytes, reason: str) -> None:
    texts = set()
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            decode(data)
        texts.add(str(caught.value))
    assert len(texts) == 1
    assert len(texts.pop()) <= 100


def test_an_image_just_above_the_bound_is_refused(encode_image: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_image(noise(10, 10))
    monkeypatch.setattr("storage.images.transforms.MAX_PIXELS", 100)
    assert decode(data).size == (10, 10)
    monkeypatch.setattr("storage.images.transforms.MAX_PIXELS", 99)
    with pytest.raises(UnreadableImage, match="10x10 pixels, more than 99"):
        decode(data)


def test_float_pixels_are_refused(encode_image: Encode) -> None:
    with pytest.raises(UnreadableImage, match="32-bit pixels"):
        decode(encode_image(np.zeros((8, 8), np.float32), "TIFF"))
