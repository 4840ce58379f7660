import io
from pathlib import Path

import numpy as np
import tiny
from judging import as_samples
from PIL import Image

from dit.export import CheckpointManifest
from dit.report.by_class import by_class


def strip(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, tiny.SIDE, tiny.SIDE, 3), np.uint8)


def test_the_first_samples_of_each_class_that_was_drawn(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    images, labels = noise(6), np.array([2, 0, 2, 2, 0, 2], np.int32)
    rows = by_class(as_samples(tmp_path, checkpoint, images, labels), classes=10, each=3)
    assert [name for name, _ in rows] == ["2", "7"]  # none was asked for a 5
    side = tiny.SIDE
    for (_, png), places in zip(rows, ((1, 4), (0, 2, 3)), strict=True):
        found = strip(png)
        assert found.shape == (side, len(places) * (side + 2) - 2, 3)
        for at, place in enumerate(places):
            assert np.array_equal(found[:, at * (side + 2) : at * (side + 2) + side], images[place])


def test_few_of_many_classes_are_spread_over_them(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    names = tuple(f"class {number}" for number in range(100))
    labels = np.arange(100, dtype=np.int32)
    found = by_class(as_samples(tmp_path, checkpoint, noise(100), labels, names), classes=4, each=3)
    assert [name for name, _ in found] == ["class 0", "class 33", "class 66", "class 99"]


def test_there_is_none_without_labels(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    samples = as_samples(tmp_path, checkpoint, noise(2), np.full(2, -1, np.int32))
    assert by_class(samples, classes=4, each=3) == []
