"""Images to numbers: how far the samples are from the data, in a named feature space."""

# B = batch, H = image side

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dit.devices import device
from dit.export import CheckpointManifest
from dit.metrics.comparison import Estimate
from dit.metrics.extractors.base import FeatureExtractor, Images
from dit.metrics.extractors.load import ExtractorRef, load_extractor, weights_sha256
from dit.metrics.frechet import Statistics
from dit.metrics.measure import KEPT_REFERENCE, Measure, conditions, modes, names, title
from dit.metrics.reference import ReferenceManifest, kept, reference
from dit.metrics.sets import NOISE_SEED, NoiseImages, SplitImages, StoredImages
from dit.metrics.summary import Summary, check_counts, compare
from dit.ranks import joined
from dit.rates import at_once, beside, comparison_rate, extractor_rate, pairs
from dit.sample import SampleManifest
from storage.archives.open import HELD_OUT
from storage.config import Config, operational
from storage.estimate import PlanContext, StageCost
from storage.header import Header
from storage.images import transforms
from storage.latents import LatentManifest
from storage.manifest import Manifest, StageOutput
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest
from storage.stage import StageDefinition
from storage.tracker import Tracker, publish

VERSION = 4
TIMEOUT = timedelta(days=7)
"""How long ranks wait for one another: features of a million images can take days on a CPU."""


class EvaluateConfig(Config):
    """Settings of the evaluation stage."""

    extractor: ExtractorRef
    """Network in whose feature space samples are compared with the training images."""
    batch_size: int = operational(256, ge=1)
    """Images in one pass of the extractor."""


class MetricsManifest(Manifest):
    """Metrics, and everything that they depend on."""

    STAGE = "evaluate"

    distance: str
    """Name of the distance with its feature space, such as ``FD[demo-digits@1a2b3c4d]``. It is an FID only with the
    published weights of Inception."""
    conditions: dict[str, str | int | float]
    """How the numbers were computed: publish it with them."""

    @property
    def metric(self) -> str:
        """Name of the distance among the metrics: ``fid`` or ``fd``."""
        return self.distance.partition("[")[0].lower()

    @property
    def estimate(self) -> Estimate:
        """The distance with its interval."""
        return Estimate.of(self.metric, self.metrics)


@runtime_checkable
class Classifier(Protocol):
    """An extractor that also classifies images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of its classes."""

    def classify(self, images: Images) -> Tensor:
        """Labels int64 (B,) of images uint8 (B, H, H, 3)."""


def run(config: EvaluateConfig, samples: SampleManifest, *, out: StageOutput, tracker: Tracker) -> MetricsManifest:
    """Compare samples with the training images, on all ranks, and commit the metrics.

    ``fd`` is the Fréchet distance to the training images; with the published Inception it is named ``fid``.
    ``fd_ceiling`` is the distance of uniform noise. ``fd_floor`` is that of held-out images, if there are at
    least two. With fewer images the distance is larger, so the floor uses no more images than there are
    samples, and ``fd_at_floor_n`` is the distance of as many samples. ``recognised`` is the share of samples
    that a classifier recognises as the requested class. `dit.metrics.summary.compare` has the other metrics;
    those that need single features use all samples and at most 10,000 training images.

    Raises:
        InputError: the extractor cannot be loaded or cannot read these images, there are fewer than
            four samples, or the outputs that they came from are missing.
        StorageError: samples or images are not what was committed.
    """
    with joined(TIMEOUT) as ranks:
        extractor = load_extractor(config.extractor, device())
        latents = samples.parent("checkpoint", CheckpointManifest).latents()
        sets = _sets(samples, latents.parent("shards", ShardManifest), latents.split)
        held_out = sets.held_out.count if sets.held_out else 0
        counts = _counts(sets.samples.count, sets.training.count, held_out)
        check_counts(counts["reference"], counts["samples"])
        measure = Measure(extractor, tracker, _total(counts), config.batch_size, ranks)
        summaries = _summaries(measure, sets, counts, out.root)
        ranks.finish()
        if ranks.first:
            metrics = _metrics(summaries, extractor)
            if isinstance(extractor, Classifier) and set(samples.class_names) <= set(extractor.class_names):
                metrics |= _recognised(extractor, sets, samples.class_names, config.batch_size)
            facts = {
                "distance": title(extractor),
                "conditions": samples.conditions | conditions(extractor) | _of_sets(sets),
            }
            _commit(metrics, counts, facts, out.using(_references(extractor, sets, counts, out.root)), tracker)
        ranks.wait()
        return MetricsManifest.read(out.uri)


@dataclass(frozen=True)
class _Sets:
    """The sets of images that are compared."""

    samples: StoredImages
    training: SplitImages
    held_out: SplitImages | None


def _sets(samples: SampleManifest, shards: ShardManifest, split: str) -> _Sets:
    side = samples.resolution
    held_out = SplitImages(shards, HELD_OUT, side) if HELD_OUT in shards.splits else None
    stored = StoredImages(RowReader(samples), side, samples.digest)
    return _Sets(stored, SplitImages(shards, split, side), held_out)


def _counts(samples: int, training: int, held_out: int) -> dict[str, int]:
    floor = min(held_out, samples) if held_out > 1 else 0  # one image has no covariance
    return {
        "samples": samples,
        "reference": training,
        "reference_kept": min(training, KEPT_REFERENCE),
        "floor": floor,
    }


def _total(counts: Mapping[str, int]) -> int:
    """Images passed through the extractor."""
    return counts["reference"] + 2 * counts["samples"] + counts["floor"]


@dataclass(frozen=True)
class _Summaries:
    """Statistics and features of each set, on the first rank."""

    training: Summary
    samples: Summary
    at_floor: Statistics
    """Statistics of as many samples as the floor has images."""
    noise: Summary
    held_out: Summary | None


def _summaries(measure: Measure, sets: _Sets, counts: Mapping[str, int], root: str) -> _Summaries:
    """Measure all sets, on all ranks."""
    count, floor = counts["samples"], counts["floor"]
    training = reference(measure, sets.training, root, count=counts["reference"], keep=counts["reference_kept"])
    samples = measure(sets.samples, range(floor), keep=count)
    at_floor = samples.statistics
    measure(sets.samples, range(floor, count), samples, keep=count)
    noise = measure(NoiseImages(count, sets.samples.side))
    held_out = reference(measure, sets.held_out, root, count=floor, keep=0) if sets.held_out and floor else None
    return _Summaries(training, samples, at_floor, noise, held_out)


def _references(
    extractor: FeatureExtractor, sets: _Sets, counts: Mapping[str, int], root: str
) -> dict[str, ReferenceManifest]:
    """The outputs that hold the statistics of the reference images."""
    count, keep = counts["reference"], counts["reference_kept"]
    found = {"reference": kept(extractor, sets.training, root, count=count, keep=keep)}
    if sets.held_out and counts["floor"]:
        found["held_out"] = kept(extractor, sets.held_out, root, count=counts["floor"], keep=0)
    return {name: manifest for name, manifest in found.items() if manifest}


def _metrics(summaries: _Summaries, extractor: FeatureExtractor) -> dict[str, float]:
    training, distance = summaries.training.statistics, names(extractor).distance
    metrics = compare(summaries.training, summaries.samples, names(extractor), modes(extractor))
    metrics[f"{distance}_ceiling"] = training.distance(summaries.noise.statistics)
    if summaries.held_out:
        metrics[f"{distance}_floor"] = training.distance(summaries.held_out.statistics)
        metrics[f"{distance}_at_floor_n"] = training.distance(summaries.at_floor)
    return metrics


def _commit(
    metrics: dict[str, float], counts: dict[str, int], facts: dict[str, Any], out: StageOutput, tracker: Tracker
) -> None:
    tracker.metrics(metrics, step=0)
    page = json.dumps(facts | {"metrics": metrics, "counts": counts}, indent=1).encode()
    files = [publish(out, tracker, "metrics.json", page)]
    out.commit(MetricsManifest, files, counts=counts, metrics=metrics, **facts)


def _recognised(classifier: Classifier, sets: _Sets, class_names: tuple[str, ...], batch_size: int) -> dict[str, float]:
    """The share of samples that are classified as the requested class; nothing if no class was requested."""
    labels = sets.samples.reader.array("label")
    if (labels < 0).any():
        return {}
    batches = sets.samples.batches(batch_size)
    predicted = torch.cat([classifier.classify(torch.from_numpy(batch)).cpu() for batch in batches])
    requested = np.array(class_names)[labels]
    return {"recognised": float((np.array(classifier.class_names)[predicted.numpy()] == requested).mean())}


def _of_sets(sets: _Sets) -> dict[str, str | int | float]:
    return {
        "reference": sets.training.shards.digest,
        "reference_split": sets.training.split,
        "reference_crop": f"{transforms.CROP_ID}-{sets.training.side}",
        "noise_seed": NOISE_SEED,
    }


def check(config: EvaluateConfig, samples: SampleManifest, plan: PlanContext) -> None:
    """Check that there are images enough, and that the extractor reads images of this size.

    Raises:
        InputError: as `run`.
    """
    counts = _planned(samples, plan)
    check_counts(counts["reference"], counts["samples"])
    load_extractor(config.extractor)(np.zeros((1, samples.resolution, samples.resolution, 3), np.uint8))


def _planned(samples: SampleManifest, plan: PlanContext) -> dict[str, int]:
    """The numbers of images, some of which may not exist yet."""
    held_out = plan.manifest(ShardManifest).splits.get(HELD_OUT)
    return _counts(samples.counts["images"], plan.manifest(LatentManifest).count, held_out.count if held_out else 0)


def estimate(config: EvaluateConfig, samples: SampleManifest, plan: PlanContext) -> StageCost:
    """What it takes to measure the samples. An earlier evaluation keeps the statistics of the training images.

    Raises:
        InputError: the extractor cannot be loaded.
    """
    counts = _planned(samples, plan)
    earlier = plan.before.get(MetricsManifest.STAGE)
    kept = counts["reference"] if earlier and _judge(earlier) == _judge(plan.out.header) else 0
    rate = plan.rate("evaluate", lambda: extractor_rate(config.extractor, samples.resolution, config.batch_size))
    compared = plan.rate("compare", lambda: comparison_rate(config.extractor))
    decoding = (counts["reference"] - kept + counts["floor"]) / plan.rates["load"] / plan.nodes
    measuring = beside(decoding, (_total(counts) - kept) / rate / at_once(plan.world_size))
    return StageCost(
        images=counts["reference_kept"] + counts["samples"],
        objects=2,
        size=10_000,
        units=1,
        done=0,
        seconds=measuring + pairs(counts["reference_kept"], counts["samples"]) / compared,
        leaves={"distance": "", "conditions": {}},
    )


def _judge(output: Header) -> tuple[str, Any]:
    """What must be equal for the statistics of the training images to be found again."""
    return output.inputs["extractor"], output.config["extractor"].get("onnx")


DEFINITION = StageDefinition(
    EvaluateConfig,
    MetricsManifest,
    VERSION,
    run,
    lambda config, _: {"extractor": weights_sha256(config.extractor)},
    estimate,
    {
        "evaluate": "images passed through the feature extractor in a second",
        "compare": "pairs of features compared in a second",
    },
    check,
)
