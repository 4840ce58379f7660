"""From the bytes of an image file to the square that the models see.

Bytes are untrusted: only plain raster formats are tried, each with a bound on its pixels, and a
file that is not whole is refused rather than half shown.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

CROP_ID = "box-bicubic-centre"
"""Names the crop in conditions and caches; changes when the pixels would."""

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
    """Size and format of an image, found by decoding all of it.

    Raises:
        UnreadableImage: as `decode`.
    """
    image, name = _decoded(data)
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
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def load(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode and crop: (size, size, 3) uint8.

    Raises:
        UnreadableImage: as `decode`.
    """
    return center_crop(decode(data), size)


def _decoded(data: bytes) -> tuple[Image.Image, str]:
    try:
        image = _opened(data)
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
    return image.convert("RGB")


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    first = str(error).partition("\n")[0][:100]
    return first or type(error).__name__
