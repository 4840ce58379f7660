"""A synthetic archive of any size in the form of ImageNet: a tar of class tars, with a few odd files as there."""

import io
import struct
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

CLASSES = 1000
SIZE = (500, 375)
"""Width and height of a typical image in pixels."""
_KINDS = {31: "CMYK", 71: "PNG"}
_PICTURES = 16  # different pictures; a comment makes each file unique


def class_name(label: int) -> str:
    """A name like that of a synset."""
    return f"n{label:08d}"


def file_name(number: int, classes: int = CLASSES) -> str:
    """``class/name`` of an image; consecutive numbers are of different classes."""
    name = class_name(number % classes)
    return f"{name}/{name}_{number}.JPEG"


def file_bytes(number: int, size: tuple[int, int] = SIZE) -> bytes:
    """A unique image file for each number; a few are grey, CMYK, rotated by EXIF, or PNG despite their name."""
    text = f"image {number}"
    kind = _KINDS.get(number % 1009) or {7: "L", 53: "EXIF"}.get(number % 61, "RGB")
    if kind == "PNG":
        return _png(number % _PICTURES, text, size)
    data = _jpeg(number % _PICTURES, kind, size)
    return data[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(text)) + text.encode() + data[2:]


def write_archive(path: Path, images: int, classes: int = CLASSES, size: tuple[int, int] = SIZE) -> None:
    """Write a tar of class tars, with one class in memory at a time."""
    write_class_tars(path, images, classes, lambda number: file_bytes(number, size))


def write_class_tars(path: Path, images: int, classes: int, content: Callable[[int], bytes]) -> None:
    """Write a tar of class tars, with one class in memory at a time.

    Args:
        path: of the tar.
        images: number of images over all classes.
        classes: number of classes.
        content: the bytes of an image file, by its number.
    """
    with tarfile.open(path, "w") as outer:
        for label in range(classes):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in range(label, images, classes):
                    add(tar, file_name(number, classes).partition("/")[2], content(number))
            add(outer, f"{class_name(label)}.tar", inner.getvalue())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@cache
def _pixels(picture: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Smooth colours with some noise, (H, W, 3): at full size about 110 kB as JPEG, as in ImageNet."""
    width, height = size
    rng = np.random.default_rng(picture)
    y, x = np.arange(height)[:, None, None], np.arange(width)[:, None]
    waves = 60 * np.sin(x / rng.uniform(20, 60, 3) + picture) + 50 * np.cos(y / rng.uniform(20, 60, 3))
    noise = rng.normal(0, 11, (height, width, 3))
    pixels: NDArray[np.uint8] = np.clip(128 + waves + noise, 0, 255).astype(np.uint8)
    return pixels


@cache
def _jpeg(picture: int, kind: str, size: tuple[int, int]) -> bytes:
    image, exif = Image.fromarray(_pixels(picture, size)), Image.Exif()
    if kind == "EXIF":
        exif[0x0112] = 6
    buffer = io.BytesIO()
    image.convert("RGB" if kind == "EXIF" else kind).save(buffer, "JPEG", quality=90, exif=exif)
    return buffer.getvalue()


def _png(picture: int, text: str, size: tuple[int, int]) -> bytes:
    about, buffer = PngInfo(), io.BytesIO()
    about.add_text("Comment", text)
    Image.fromarray(_pixels(picture, size)[:64, :64]).save(buffer, "PNG", pnginfo=about, compress_level=1)
    return buffer.getvalue()
