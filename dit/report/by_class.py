"""Samples grouped by class."""

# N = samples, K = samples of a class that are shown

import numpy as np

from dit.sample import SampleManifest
from storage.images.grid import image_grid
from storage.rows.store import RowReader


def by_class(samples: SampleManifest, *, classes: int, each: int) -> list[tuple[str, bytes]]:
    """The first samples of some classes.

    Args:
        samples: N of them.
        classes: number of classes at most, evenly spread over those that have samples.
        each: K at most.

    Returns:
        The name of each class and a PNG of its samples in one row; nothing if the samples have no classes.

    Raises:
        StorageError: the samples are not what was committed.
    """
    reader = RowReader(samples)
    labels = reader.array("label")
    drawn = np.unique(labels[labels >= 0])
    chosen = drawn[np.linspace(0, len(drawn) - 1, min(classes, len(drawn))).astype(int)]
    places = [np.flatnonzero(labels == label)[:each] for label in chosen]
    return [
        (samples.class_names[label], image_grid(reader.take("image", at), each, gap=2))
        for label, at in zip(chosen, places, strict=True)
    ]
