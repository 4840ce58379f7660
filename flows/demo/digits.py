"""The demo's images: scikit-learn's 1,797 scans of handwritten digits (UCI, Alpaydin and Kaynak 1998)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from flows import temporary
from storage.errors import InputError

SIZE: Final = 32
"""Side of the images in pixels."""
TRAIN_COUNT: Final = 1500
"""The first scans are for training, the last 297 are held out."""
SPLITS: Final = {"train": slice(0, TRAIN_COUNT), "held_out": slice(TRAIN_COUNT, None)}


def digit_images(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images (N, 32, 32, 3) in 0..255 and the labels (N,) in 0..9 of ``train`` or ``held_out``.

    The scans are 8x8 in 0..16; bicubic upscaling in integers gives the same pixels on every machine.
    """
    scans = load_digits()
    part = SPLITS[split]
    grey = np.rint(scans.images[part] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(scan).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for scan in grey]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1), scans.target[part].astype(np.int64)


def write_digits(folder: Path) -> None:
    """Write ``<split>/<class>/<index>.png`` for both splits; do nothing if they are there.

    The folder appears complete or not at all, with the same bytes each time.

    Raises:
        InputError: the folder holds something else.
    """
    if _complete(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary.folder(folder.parent, f".{folder.name}-being-written-") as place:
        unfinished = place / "digits"
        for path, pixels in _pictures():
            target = unfinished / path
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target, format="PNG")
        try:
            unfinished.rename(folder)
        except OSError:
            if not _complete(folder):  # else another process has written it
                raise


def _pictures() -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for split in SPLITS:
        images, labels = digit_images(split)
        for index, label in enumerate(labels):
            yield f"{split}/{label}/{index:04d}.png", images[index]


def _complete(folder: Path) -> bool:
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder for the digits")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if found and found != {path for path, _ in _pictures()}:
        raise InputError(f"{folder}: holds something other than the demo's digits; name another folder or remove it")
    return bool(found)
