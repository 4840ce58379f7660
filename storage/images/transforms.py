"""From the bytes of an image file to the square that the models see.

Bytes are untrusted: only plain raster formats are tried, each with a bound on its pixels, and a
file that is not whole is refused rather than half shown.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from storage.images.jpeg import is_whole

CROP_ID = "box-bicubic-centre"
"""Names `center_crop` in conditions and caches; changes when the pixels would."""

FAST_CROP_ID = "box-bicubic-centre-fast"
"""Names `fast_crop`."""

MAX_PIXELS = 89_478_485
"""Pixels that one image may have, Pillow's own bound: 256 MB as RGB."""

MAX_ASPECT = 50
"""Long side to short side: the crop scales the whole image, so a thin one of few bytes would fill the memory."""

_EXTENSIONS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}


class UnreadableImage(Exception):  # noqa: N818  a finding about an image, to be listed, not a crash
    """The bytes are no image that can be used; the text says why, in a few words."""


@dataclass(frozen=True)
class Facts:
    """What the bytes of a whole image say about it."""

    width: int
    height: int
    extension: str
    """The usual ending of its format, whatever the file is called: ``jpg``, ``png``."""


def decode(data: bytes) -> Image.Image:
    """The image as RGB, fully decoded, converted as Pillow converts and without turning it by EXIF.

    Transparency is dropped. Sixteen bits of grey become eight by their upper half, where Pillow
    alone would make nearly all of them white.

    Raises:
        UnreadableImage: the bytes are truncated, corrupt, too large, or no image.
    """
    return _decoded(data)[0]


def inspect(data: bytes) -> Facts:
    """Size and format of an image that `decode` can decode, found by doing so where its markers do not tell.

    Raises:
        UnreadableImage: as `decode`.
    """
    image, name = _decoded(data, header=is_whole(data))
    return Facts(image.width, image.height, _EXTENSIONS.get(name, "jpg"))  # MPO: a JPEG with more behind it


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The centre square: halve while twice as large, scale the short side to size, cut.

    The crop of Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), which
    the published Fréchet distances of class-conditional ImageNet rest on: BOX for the halvings,
    BICUBIC for the last step.

    Args:
        image: RGB.
        size: pixels of a side.

    Returns:
        (size, size, 3) uint8.
    """
    image = _halved(image, size)
    width, height = _scaled(image, size)
    pixels = np.asarray(_resized(image, (width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def fast_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """As `center_crop` but for a rounding in one value of thousands: what is cut off is not scaled.

    Pillow takes the box in float32. The rounding is one level, in one value of many millions two.

    Args:
        image: RGB.
        size: pixels of a side.

    Returns:
        (size, size, 3) uint8.
    """
    image = _halved(image, size)
    width, height = _scaled(image, size)
    top, left = (height - size) // 2, (width - size) // 2
    x0, x1 = (edge * image.width / width for edge in (left, left + size))
    y0, y1 = (edge * image.height / height for edge in (top, top + size))
    reach = 2 * max(1, image.height / height) + 1  # of the filter, in rows
    first, last = max(0, math.floor(y0 - reach)), min(image.height, math.ceil(y1 + reach))
    rows = image if last - first == image.height else image.crop((0, first, image.width, last))
    return np.asarray(_resized(rows, (size, size), Image.Resampling.BICUBIC, (x0, y0 - first, x1, y1 - first)))


def load(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode and crop as the reference does: (size, size, 3) uint8.

    Raises:
        UnreadableImage: as `decode`.
    """
    return center_crop(decode(data), size)


def load_fast(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode and crop as the reference does but for roundings: (size, size, 3) uint8.

    Raises:
        UnreadableImage: as `decode`.
    """
    return fast_crop(decode(data), size)


def _halved(image: Image.Image, size: int) -> Image.Image:
    """The image, halved for as long as its short side is at least twice the size."""
    while min(image.size) >= 2 * size:
        image = _resized(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _resized(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """A box of the image, scaled across and then down.

    Each direction is rounded to bytes, and Pillow 13 goes down first where an image is tall: up to
    tens of levels from the older Pillow of the published numbers.
    """
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    across = image.resize((size[0], image.height), resample, (x0, 0, x1, image.height))
    return across.resize(size, resample, (0, y0, size[0], y1))


def _scaled(image: Image.Image, size: int) -> tuple[int, int]:
    """Width and height once the short side has the size."""
    scale = size / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _decoded(data: bytes, *, header: bool = False) -> tuple[Image.Image, str]:
    """The image, or only its header, and the name of its format."""
    try:
        image = _opened(data)
        if header:
            return image, str(image.format)
        image.load()
        return _rgb(image), str(image.format)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly every kind on damaged bytes
        raise UnreadableImage(_reason(data, error)) from error


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=tuple(_EXTENSIONS))
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnreadableImage(f"{image.width}x{image.height} pixels, one side over {MAX_ASPECT} times the other")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImage("32-bit pixels of unknown range")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    first = str(error).partition("\n")[0][:100]
    return first or type(error).__name__
