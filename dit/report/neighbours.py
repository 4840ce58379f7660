"""Samples beside their nearest training images: does the model repeat training images?"""

# B = samples, K = neighbours, N = training images, D = features

from dataclasses import dataclass

import numpy as np
import torch

from dit.devices import device
from dit.evaluate import EvaluateConfig
from dit.export import CheckpointManifest
from dit.metrics.extractors.load import load_extractor
from dit.metrics.measure import KEPT_REFERENCE, Measure
from dit.metrics.reference import reference
from dit.metrics.sets import SplitImages
from dit.sample import SampleManifest
from storage.images.grid import image_grid
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest
from storage.tracker import Tracker

AMONG = 2000
"""Training images whose own nearest neighbours give the usual distance."""


@dataclass(frozen=True)
class Neighbours:
    """Nearest neighbours of some samples."""

    picture: bytes
    """A PNG: a sample in each row, then its neighbours, the nearest first."""
    distances: list[list[float]]
    """(B, K), in the extractor's feature space."""
    usual: float
    """Median distance of a training image to its nearest neighbour."""
    among: int
    """N, the number of training images that were searched."""


def neighbours(
    config: EvaluateConfig, samples: SampleManifest, *, root: str, count: int, nearest: int, tracker: Tracker
) -> Neighbours:
    """The nearest training images of the first ``count`` samples, by the features that evaluation keeps.

    Args:
        config: names the extractor.
        samples: from a model trained on the images.
        root: folder where statistics and features of reference images are kept.
        count: B at most.
        nearest: K at most.
        tracker: receives the progress.

    Raises:
        InputError: the extractor cannot be loaded, or the outputs that the samples came from are missing.
        StorageError: samples or images are not what was committed.
    """
    latents = samples.parent("checkpoint", CheckpointManifest).latents()
    training = SplitImages(latents.parent("shards", ShardManifest), latents.split, samples.resolution)
    kept = min(training.count, KEPT_REFERENCE)
    extractor = load_extractor(config.extractor, device())
    measure = Measure(extractor, tracker, training.count, config.batch_size)
    summary = reference(measure, training, root, count=training.count, keep=kept)
    features = summary.features()
    shown = RowReader(samples).take("image", np.arange(min(count, samples.counts["images"])))
    distances = torch.cdist(extractor(torch.from_numpy(shown)).to(features), features)
    nearest_distances, indices = (each.cpu() for each in distances.topk(min(nearest, kept), largest=False))
    neighbour = {i: next(training.batches(1, [range(i, i + 1)]))[0] for i in indices.unique().tolist()}
    rows = [[sample, *map(neighbour.get, row)] for sample, row in zip(shown, indices.tolist(), strict=True)]
    grid = image_grid(np.stack([image for row in rows for image in row]), len(rows[0]), gap=2)
    return Neighbours(grid, nearest_distances.tolist(), _usual(features), kept)


def _usual(features: torch.Tensor) -> float:
    some = features[:AMONG]
    between = torch.cdist(some, some).fill_diagonal_(float("inf"))
    return float(between.min(1).values.median())
