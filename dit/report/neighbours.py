"""Samples beside the training images that are nearest to them: does the model repeat what it has seen?"""

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
from storage.latents import LatentManifest
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest
from storage.tracker import Tracker

AMONG = 2000
"""Training images whose own nearest neighbours say what is usual."""


@dataclass(frozen=True)
class Neighbours:
    """What was found."""

    picture: bytes
    """A PNG: a sample in each row, then its neighbours, the nearest first."""
    distances: list[list[float]]
    """(B, K), in the extractor's feature space."""
    usual: float
    """The median distance of a training image to the nearest other one."""
    among: int
    """N, the training images that were looked at."""


def neighbours(
    config: EvaluateConfig, samples: SampleManifest, *, root: str, count: int, nearest: int, tracker: Tracker
) -> Neighbours:
    """The nearest training images of the first ``count`` samples, by the features that evaluation keeps.

    Args:
        config: names the extractor.
        samples: from a model trained on the images.
        root: where statistics and features of reference images are kept.
        count: B at most.
        nearest: K at most.
        tracker: learns how far it is.

    Raises:
        InputError: the extractor cannot be loaded, or the stages behind the samples are gone.
        StorageError: samples or images are not what was committed.
    """
    latents = samples.parent("checkpoint", CheckpointManifest).parent("latents", LatentManifest)
    training = SplitImages(latents.parent("shards", ShardManifest), latents.split, samples.resolution)
    kept = min(training.count, KEPT_REFERENCE)
    extractor = load_extractor(config.extractor, device())
    measure = Measure(extractor, tracker, training.count, config.batch_size)
    summary = reference(measure, training, root, count=training.count, keep=kept)
    features = summary.features()
    shown = RowReader(samples).take("image", np.arange(min(count, samples.counts["images"])))
    distances = torch.cdist(extractor(torch.from_numpy(shown)).to(features), features)
    found, places = (each.cpu() for each in distances.topk(min(nearest, kept), largest=False))
    near = {place: next(training.batches(1, [range(place, place + 1)]))[0] for place in places.unique().tolist()}
    rows = [image for sample, at in zip(shown, places.tolist(), strict=True) for image in (sample, *map(near.get, at))]
    return Neighbours(image_grid(np.stack(rows), found.shape[1] + 1, gap=2), found.tolist(), _usual(features), kept)


def _usual(features: torch.Tensor) -> float:
    some = features[:AMONG]
    between = torch.cdist(some, some).fill_diagonal_(float("inf"))
    return float(between.min(1).values.median())
