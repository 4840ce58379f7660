"""Small images in the form in which ImageNet is published, of any number, some of them odd or damaged."""

import gzip
import io
import struct
import tarfile
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from scipy.io import savemat

from benchmarks.imagenet_like import add, class_name, write_class_tars
from benchmarks.photos import photo

CLASSES, HELD_OUT = 1000, 50_000
SIDE = 32
"""Side of the images, pixels."""
EVERY = {"CMYK": 97, "PNG": 101, "L": 89}
"""One image in so many is CMYK, PNG despite its name, or grey: 3 % together."""
TRUNCATED = 2003
"""One image in so many ends too early: half of what `shard.max_unreadable` allows."""
_FIRST_ID = 7  # that class 0 has in the devkit; ImageNet's ids are in another order than its synsets, too
_DATA = "ILSVRC2012_devkit_t12/data"


class Pictures:
    """Image files by number: those of a zip in turn, or made ones. A comment makes each JPEG unique.

    Args:
        source: a zip of small JPEGs, such as CIFAR-10's; None for made ones.
    """

    def __init__(self, source: Path | None) -> None:
        self._files = _made() if source is None else _unpacked(source)

    def file(self, number: int) -> bytes:
        """The bytes of an image file."""
        kind = next((kind for kind, every in EVERY.items() if number % every == 1), "RGB")
        data = self._as(kind, number % (len(self._files) if kind == "RGB" else 64))
        if number % TRUNCATED == 2:
            return data[: len(data) // 2]
        return data if kind == "PNG" else _with_comment(data, f"image {number}")

    @lru_cache(maxsize=256)  # noqa: B019  one for the whole run
    def _as(self, kind: str, picture: int) -> bytes:
        data = self._files[picture]
        if kind == "RGB":
            return data
        buffer = io.BytesIO()
        image = Image.open(io.BytesIO(data))
        image.convert("RGB" if kind == "PNG" else kind).save(buffer, "PNG" if kind == "PNG" else "JPEG")
        return buffer.getvalue()


def write(folder: Path, images: int, held_out: int, pictures: Pictures, classes: int = CLASSES) -> dict[str, str]:
    """Write the tar of class tars, the tar of held-out images and its devkit, unless they are there.

    Returns:
        Their paths, by the names that a recipe has for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {"train": "train.tar", "held_out": "val.tar", "held_out_labels": "ILSVRC2012_devkit_t12.tar.gz"}
    paths = {name: str(folder / file) for name, file in names.items()}
    train, val, devkit = map(Path, paths.values())
    if devkit.exists():  # which is written last
        return paths
    write_class_tars(train, images, classes, pictures.file)
    with tarfile.open(val, "w") as tar:
        for number in range(held_out):
            add(tar, f"ILSVRC2012_val_{number + 1:08d}.JPEG", pictures.file(images + number))
    devkit.write_bytes(_devkit(held_out, classes))
    return paths


def write_autoencoder(folder: Path) -> None:
    """A tiny autoencoder with random weights, which halves the sides twice: 32 x 32 pixels to 4 x 8 x 8."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(2, 2, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=SIDE,
    ).save_pretrained(folder)


def _devkit(held_out: int, classes: int) -> bytes:
    """Class and number of each held-out image, as published."""
    columns = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "num_children")]
    rows = [((label + _FIRST_ID) % classes + 1, class_name(label), 0) for label in range(classes)]
    meta, packed = io.BytesIO(), io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, columns).reshape(-1, 1)}, do_compression=True)
    truth = "".join(f"{rows[number % classes][0]}\n" for number in range(held_out))
    with tarfile.open(fileobj=packed, mode="w") as tar:
        add(tar, f"{_DATA}/meta.mat", meta.getvalue())
        add(tar, f"{_DATA}/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return gzip.compress(packed.getvalue())


def _with_comment(data: bytes, text: str) -> bytes:
    return data[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(text)) + text.encode() + data[2:]


def _unpacked(source: Path) -> list[bytes]:
    with zipfile.ZipFile(source) as packed:
        return [packed.read(name) for name in packed.namelist() if name.endswith(".jpg")]


def _made() -> list[bytes]:
    """A thousand cut-outs of made photographs."""
    files = []
    for number in range(10):
        pixels = photo(number)
        for cut in range(100):
            top, left = divmod(cut, 10)
            piece = Image.fromarray(pixels[32 * top :, 32 * left :][:SIDE, :SIDE])
            buffer = io.BytesIO()
            piece.save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
    return files
