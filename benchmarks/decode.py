"""Decoding and cropping JPEGs for a model: our code against Pillow with the reference crop, on one core."""

import io
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import Measured, Result, main
from benchmarks.photos import jpeg
from storage.images import transforms

IMAGES, SIZE, ROUNDS = 64, 256, 9

Load = Callable[[bytes, int], NDArray[np.uint8]]


def plain(data: bytes, size: int) -> NDArray[np.uint8]:
    """Pillow and the reference crop of ADM."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.array(image)[top : top + size, left : left + size]


def decoded(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decoding alone, which the others include."""
    return np.empty(Image.open(io.BytesIO(data)).convert("RGB").size, np.uint8)


CONTESTANTS: dict[str, Load] = {
    "reference": plain,
    "ours": transforms.load_fast,
    "ours_exact": transforms.load,
    "decoding": decoded,
}


def measure() -> Measured:
    """Measure on synthetic photographs of ImageNet's typical size."""
    return contest([jpeg(number) for number in range(IMAGES)], SIZE, ROUNDS)


def contest(images: list[bytes], size: int, rounds: int) -> Measured:
    """Images in a second of CPU time, the fastest of the interleaved rounds, and the difference of the pixels.

    Raises:
        ValueError: a pixel is more than one level from the reference.
    """
    reference = np.stack([plain(data, size) for data in images]).astype(int)
    apart = np.abs(np.stack([transforms.load_fast(data, size) for data in images]) - reference)
    if apart.max() > 1:
        raise ValueError(f"pixels differ from the reference by up to {apart.max()} levels")
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, load in CONTESTANTS.items():
            begin = time.thread_time()
            for data in images:
                load(data, size)
            times[name].append(time.thread_time() - begin)
    speeds = {name: len(images) / min(found) for name, found in times.items()}
    results = [Result(name, speed, "images/s/core") for name, speed in speeds.items()]
    results += [
        Result("difference_max", float(apart.max()), "levels"),
        Result("difference_mean", float(apart.mean()), "levels"),
    ]
    return results, {
        "decode_vs_reference": speeds["ours"] / speeds["reference"],
        "exact_vs_reference": speeds["ours_exact"] / speeds["reference"],
    }


if __name__ == "__main__":
    main(measure, __doc__)
