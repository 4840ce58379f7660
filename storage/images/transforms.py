"""From the bytes of an image file to the square crop that models are trained on.

The bytes are untrusted: only raster formats are tried, the number of pixels is limited, and a
truncated file is refused instead of decoded in part.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from storage.images.jpeg import complete
from storage.magic import RAW, not_an_image, unsupported

CROP_ID = "box-bicubic-centre"
"""Identifies `center_crop` in conditions and caches; it changes when the pixels change."""

FAST_CROP_ID = "box-bicubic-centre-fast"
"""Identifies `fast_crop`."""

MAX_PIXELS = 89_478_485
"""Largest image in pixels, as Pillow's own limit: 256 MB as RGB."""

MAX_ASPECT = 50
"""Largest ratio of long to short side. The crop scales the whole image, so a very thin one would fill the memory."""

_EXTENSIONS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}
_SUBFILE_TYPE, _REDUCED, _DNG_VERSION = 254, 1, 50706  # tags of TIFF and a value


class UnreadableImage(Exception):  # noqa: N818  listed as a finding, not a failure
    """The bytes are not a usable image; the text says why, in a few words."""


@dataclass(frozen=True)
class Facts:
    """Size and format of a complete image."""

    width: int
    height: int
    extension: str
    """File extension of its format, whatever the file's name: ``jpg``, ``png``."""


def decode(data: bytes) -> Image.Image:
    """The image as RGB, fully decoded and converted by Pillow. Its EXIF orientation is ignored.

    Transparency is dropped. Of 16-bit grey the upper eight bits are kept; Pillow's own conversion
    would clip nearly all values to white.

    Raises:
        UnreadableImage: the bytes are truncated, damaged, too large, or not an image.
    """
    return _decoded(data)[0]


def inspect(data: bytes) -> Facts:
    """Size and format of an image that can be decoded: checked by its markers if it is a plain JPEG, else by decoding.

    Raises:
        UnreadableImage: as `decode`.
    """
    jpeg = complete(data)
    if jpeg and jpeg.is_bare and _fault(jpeg.width, jpeg.height) is None:
        return Facts(jpeg.width, jpeg.height, _EXTENSIONS["JPEG"])
    image, name = _decoded(data, header_only=jpeg is not None)
    return Facts(image.width, image.height, _EXTENSIONS.get(name, "jpg"))  # MPO: a JPEG followed by more images


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central square: halve the image while it is at least twice as large, scale its short side to size, crop.

    This is the crop of Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), used
    for the published Fréchet distances of class-conditional ImageNet: BOX for the halvings, BICUBIC for
    the last step.

    Args:
        image: RGB.
        size: side of the crop, pixels.

    Returns:
        (size, size, 3) uint8.
    """
    image = _halved(image, size)
    width, height = _scaled(image, size)
    pixels = np.asarray(_resized(image, (width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def fast_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """As `center_crop`, but only the pixels of the crop are scaled, which rounds a few values differently.

    Pillow holds the box in float32. One value in thousands differs by one level, one in many millions by two.

    Args:
        image: RGB.
        size: side of the crop, pixels.

    Returns:
        (size, size, 3) uint8.
    """
    image = _halved(image, size)
    width, height = _scaled(image, size)
    top, left = (height - size) // 2, (width - size) // 2
    # the crop in pixels of the image before it is scaled, and all rows that the filter reads for it
    x0, x1 = (edge * image.width / width for edge in (left, left + size))
    y0, y1 = (edge * image.height / height for edge in (top, top + size))
    reach = 2 * max(1, image.height / height) + 1  # rows: BICUBIC's radius of 2, and one for rounding
    first, last = max(0, math.floor(y0 - reach)), min(image.height, math.ceil(y1 + reach))
    rows = image if last - first == image.height else image.crop((0, first, image.width, last))
    return np.asarray(_resized(rows, (size, size), Image.Resampling.BICUBIC, (x0, y0 - first, x1, y1 - first)))


def load(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode, then `center_crop`: (size, size, 3) uint8.

    Raises:
        UnreadableImage: as `decode`.
    """
    return center_crop(decode(data), size)


def load_fast(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode, then `fast_crop`: (size, size, 3) uint8.

    Raises:
        UnreadableImage: as `decode`.
    """
    return fast_crop(decode(data), size)


def _halved(image: Image.Image, size: int) -> Image.Image:
    """The image, halved while its short side is at least twice the size."""
    while min(image.size) >= 2 * size:
        image = _resized(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _resized(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """A box of the image, scaled horizontally and then vertically.

    Pillow rounds to bytes after each direction, so their order matters. Pillow 13 scales a tall image
    vertically first, which differs by tens of levels from the older Pillow of the published results.
    """
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    horizontal = image.resize((size[0], image.height), resample, (x0, 0, x1, image.height))
    return horizontal.resize(size, resample, (0, y0, size[0], y1))


def _scaled(image: Image.Image, size: int) -> tuple[int, int]:
    """Width and height of the image when its short side is scaled to size."""
    scale = size / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _decoded(data: bytes, *, header_only: bool = False) -> tuple[Image.Image, str]:
    """The image and the name of its format; if header_only, the pixels are not decoded."""
    try:
        image = _opened(data)
        if header_only:
            return image, str(image.format)
        image.load()
        return _rgb(image), str(image.format)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise exceptions of many types on damaged bytes
        raise UnreadableImage(_reason(data, error)) from error


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=tuple(_EXTENSIONS))
    if (fault := _fault(image.width, image.height)) is not None:
        raise UnreadableImage(fault)
    if isinstance(image, TiffImageFile) and (_has_preview(image) or not_an_image(data)):
        raise UnreadableImage(unsupported(RAW))
    return image


def _fault(width: int, height: int) -> str | None:
    """What is wrong with the size of an image in pixels, or None."""
    if width * height > MAX_PIXELS:
        return f"{width}x{height} pixels, more than {MAX_PIXELS:,}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width}x{height} pixels, one side over {MAX_ASPECT} times the other"
    return None


def _has_preview(image: TiffImageFile) -> bool:
    """Whether this is a DNG, or begins with a reduced picture as other raw photographs do."""
    return _DNG_VERSION in image.tag_v2 or image.tag_v2.get(_SUBFILE_TYPE) == _REDUCED


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImage("32-bit pixels of unknown range")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "empty file"
    if (known := not_an_image(data)) is not None:
        return known
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    first = str(error).partition("\n")[0][:100]
    return first or type(error).__name__
