"""Images to numbers: how far the samples are from the data, in a named feature space."""

# B = batch, H = image side

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit.devices import device
from dit.export import CheckpointManifest
from dit.metrics.features import ExtractorRef, FeatureExtractor, Images, load_extractor
from dit.metrics.precision_recall import Mode
from dit.metrics.summary import CONDITIONS, Names, Summary, compare
from dit.random import Stream, words
from dit.sample import SampleManifest
from storage import transforms
from storage.config import Config, operational
from storage.latents import LatentManifest
from storage.manifest import Manifest, StageOutput
from storage.parallel import threads
from storage.rows import RowReader
from storage.shards import ShardManifest, read_images
from storage.tracking import Tracker, publish

VERSION = 3
NOISE_SEED = 0
HELD_OUT = "held_out"
KEPT_REFERENCE = 10_000
"""Features are kept of so many reference images, the first ones, since tars are shuffled. As in the published sets."""


class EvaluateConfig(Config):
    """How samples are judged."""

    extractor: ExtractorRef
    """The network in whose feature space the distance is taken."""
    batch_size: int = operational(256, ge=1)
    """Images in one pass of the extractor."""


class MetricsManifest(Manifest):
    """Numbers, and everything they depend on."""

    STAGE = "evaluate"

    distance: str
    """Name of the distance with its feature space, such as ``FD[demo-digits@1a2b3c4d]``. Only the published
    weights of Inception make it an FID."""
    conditions: dict[str, str | int | float]
    """What the numbers must be published with."""


@runtime_checkable
class Classifier(Protocol):
    """An extractor that also names what it sees."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """What its labels mean."""

    def classify(self, images: Images) -> Tensor:
        """Labels int64 (B,) of images uint8 (B, H, H, 3)."""


def run(config: EvaluateConfig, samples: SampleManifest, *, out: StageOutput, tracker: Tracker) -> MetricsManifest:
    """Compare samples with the images that the model was trained on, and commit the numbers.

    ``fd`` is the Fréchet distance to the training images, named ``fid`` in the space that papers use.
    Its ceiling is that of uniform noise, its floor that of held-out images, if there are at least two.
    The distance grows as the number of images falls, so the floor is taken from no more images than
    there are samples, and has a counterpart ``fd_at_floor_n`` from as many samples.
    `dit.metrics.summary.compare` says what else there is; what needs single features takes those of all
    samples and of at most 10,000 training images. ``recognised`` is the share of samples that a
    classifier takes for the class that was asked for.

    Raises:
        InputError: the extractor cannot be loaded or cannot read these images, there are fewer than
            four samples, or the stages behind them are gone.
        StorageError: samples or images are not what was committed.
    """
    extractor = load_extractor(config.extractor, device())
    latents = samples.parent("checkpoint", CheckpointManifest).parent("latents", LatentManifest)
    shards = latents.parent("shards", ShardManifest)
    reader = RowReader(samples)
    counts = _counts(shards, latents.split, len(reader))
    sets = _Sets(reader, shards, samples.resolution, config.batch_size)
    metrics = _numbers(_Measure(extractor, tracker, _total(counts)), sets, latents.split, counts)
    if isinstance(extractor, Classifier) and set(samples.class_names) <= set(extractor.class_names):
        metrics |= _recognised(extractor, sets, samples.class_names)
    tracker.metrics(metrics, step=0)
    facts = {
        "distance": f"{_names(extractor).distance.upper()}[{extractor.name}@{extractor.sha256[:8]}]",
        "conditions": samples.conditions | _conditions(extractor, shards, latents),
    }
    page = json.dumps(facts | {"metrics": metrics, "counts": counts}, indent=1).encode()
    files = [publish(out, tracker, "metrics.json", page)]
    return out.commit(MetricsManifest, files, counts=counts, metrics=metrics, **facts)


@dataclass(frozen=True)
class _Sets:
    """The sets of images that are compared, a batch (B, H, H, 3) at a time."""

    reader: RowReader
    shards: ShardManifest
    side: int
    batch_size: int

    def of_split(self, split: str, count: int) -> Iterator[NDArray[np.uint8]]:
        """The first images of a split, cropped as for training."""
        samples = read_images(self.shards, split, 0, count)
        with threads(0) as pool:
            while batch := list(islice(samples, self.batch_size)):
                yield np.stack(list(pool.map(lambda sample: transforms.load(sample.data, self.side), batch)))

    def of_samples(self, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        """The samples with these numbers."""
        for rows in self._cut(start, stop):
            yield self.reader.take("image", rows)

    def of_noise(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """Images whose bytes are all equally likely; each depends on its number alone."""
        size = self.side**2 * 3
        for rows in self._cut(0, count):
            bits = words(NOISE_SEED, Stream.NOISE_IMAGE, 0, rows.tolist(), -(-size // 8)).astype("<u8")
            yield bits.view(np.uint8)[:, :size].reshape(-1, self.side, self.side, 3)

    def _cut(self, start: int, stop: int) -> Iterator[NDArray[np.int64]]:
        for first in range(start, stop, self.batch_size):
            yield np.arange(first, min(first + self.batch_size, stop))


@dataclass
class _Measure:
    """Takes the features of sets of images, and reports to the tracker how far it is."""

    extractor: FeatureExtractor
    tracker: Tracker
    total: int
    done: int = 0

    def __call__(self, batches: Iterable[NDArray[np.uint8]], into: Summary | None = None, keep: int = 0) -> Summary:
        """Add the images to a summary, which keeps the features of its first ``keep`` ones."""
        summary = into or Summary(self.extractor.dims)
        for batch in batches:
            summary.update(self.extractor.outputs(torch.from_numpy(batch)), keep)
            self.done += len(batch)
            self.tracker.progress(self.done, self.total, "images")
        return summary


def _counts(shards: ShardManifest, split: str, samples: int) -> dict[str, int]:
    held_out = shards.splits[HELD_OUT].count if HELD_OUT in shards.splits else 0
    floor = min(held_out, samples) if held_out > 1 else 0  # one image has no covariance
    reference = shards.splits[split].count
    kept = min(reference, KEPT_REFERENCE)
    return {"samples": samples, "reference": reference, "reference_kept": kept, "floor": floor}


def _total(counts: Mapping[str, int]) -> int:
    """Images that the extractor takes the features of."""
    return counts["reference"] + 2 * counts["samples"] + counts["floor"]


def _numbers(measure: _Measure, sets: _Sets, split: str, counts: Mapping[str, int]) -> dict[str, float]:
    count, floor, names = counts["samples"], counts["floor"], _names(measure.extractor)
    reference = measure(sets.of_split(split, counts["reference"]), keep=counts["reference_kept"])
    samples = measure(sets.of_samples(0, floor), keep=count)
    at_floor = samples.statistics
    measure(sets.of_samples(floor, count), samples, keep=count)
    metrics = compare(reference, samples, names, _modes(measure.extractor))
    noise = measure(sets.of_noise(count))
    metrics[f"{names.distance}_ceiling"] = reference.statistics.distance(noise.statistics)
    if floor:
        held_out = measure(sets.of_split(HELD_OUT, floor))
        metrics[f"{names.distance}_floor"] = reference.statistics.distance(held_out.statistics)
        metrics[f"{names.distance}_at_floor_n"] = reference.statistics.distance(at_floor)
    return metrics


def _names(extractor: FeatureExtractor) -> Names:
    return Names(extractor.published)


def _modes(extractor: FeatureExtractor) -> tuple[Mode, ...]:
    return ("adm-fp16", "fp32") if extractor.name == "inception-tf" else ("fp32",)


def _recognised(classifier: Classifier, sets: _Sets, class_names: tuple[str, ...]) -> dict[str, float]:
    """The share of samples that are seen as the class that was asked for, if one was."""
    labels = sets.reader.array("label")
    if (labels < 0).any():
        return {}
    batches = sets.of_samples(0, len(labels))
    seen = torch.cat([classifier.classify(torch.from_numpy(batch)).cpu() for batch in batches])
    asked = np.array(class_names)[labels]
    return {"recognised": float((np.array(classifier.class_names)[seen.numpy()] == asked).mean())}


def _conditions(
    extractor: FeatureExtractor, shards: ShardManifest, latents: LatentManifest
) -> dict[str, str | int | float]:
    return {
        "extractor": extractor.name,
        "extractor_version": extractor.version,
        "extractor_sha256": extractor.sha256,
        "extractor_preprocessing": extractor.preprocessing,
        "reference": shards.digest,
        "reference_split": latents.split,
        "reference_crop": f"{transforms.CROP_ID}-{latents.resolution}",
        "noise_seed": NOISE_SEED,
        "precision_recall_modes": ", ".join(_modes(extractor)),
        **CONDITIONS,
    }
