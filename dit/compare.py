"""Samples from anywhere compared with a reference from anywhere, without a pipeline."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit.devices import device
from dit.evaluate import EvaluateConfig
from dit.metrics.extractors.base import FeatureExtractor
from dit.metrics.extractors.load import load_extractor
from dit.metrics.measure import KEPT_REFERENCE, Measure, conditions, modes, names, title
from dit.metrics.npz import Npz
from dit.metrics.reference import reference as kept_reference
from dit.metrics.sets import FolderImages, ImageSet, SplitImages, StoredImages
from dit.metrics.summary import Summary, check_counts, compare
from dit.sample import SampleManifest
from storage import uri
from storage.config import Config
from storage.errors import InputError
from storage.latents import LatentManifest
from storage.manifest import MANIFEST, Manifest
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest
from storage.tracker import Tracker

Conditions = dict[str, str | int | float]


class ImageComparison(Config):
    """Metrics, and everything that they depend on."""

    distance: str
    """Name of the distance with its feature space."""
    metrics: dict[str, float]
    counts: dict[str, int]
    conditions: Conditions
    """How the metrics were computed: publish it with them."""


@dataclass(frozen=True)
class _Reference:
    """What samples are compared with: images, statistics of images, or both."""

    images: ImageSet | None
    statistics: Npz | None
    conditions: Conditions


def compare_arrays(
    samples: NDArray[np.uint8], reference: NDArray[np.uint8], extractor: FeatureExtractor, *, batch_size: int = 256
) -> dict[str, float]:
    """Compare samples in memory with a reference in memory, by the metrics of `dit.metrics.summary.compare`.

    Args:
        samples: uint8 (N, H, H, 3), at least four.
        reference: uint8 (M, H, H, 3), at least four.
        extractor: the network in whose feature space they are compared.
        batch_size: images in one pass of the extractor.

    Returns:
        The metrics by name, such as ``fd``, with its 95 % interval ``fd_low`` to ``fd_high``.

    Raises:
        InputError: there are too few images, or the extractor cannot read them.
    """
    check_counts(len(reference), len(samples))

    def summary(images: NDArray[np.uint8], keep: int) -> Summary:
        measured = Summary(extractor.dims)
        for first in range(0, len(images), batch_size):
            measured.update(extractor.outputs(images[first : first + batch_size]), keep)
        return measured

    real, drawn = summary(reference, KEPT_REFERENCE), summary(samples, len(samples))
    return compare(real, drawn, names(extractor), modes(extractor))


def compare_images(
    samples: str, reference: str, config: EvaluateConfig, *, root: str, tracker: Tracker
) -> ImageComparison:
    """Compare samples with a reference, by the metrics of `dit.metrics.summary.compare`.

    Args:
        samples: manifest of a sample store or its folder, folder of images, or npz with ``arr_0``.
        reference: npz with images, statistics or both; manifest of shards, latents or samples; folder of
            images, which are cropped to the samples' size as for training.
        config: the extractor.
        root: folder where statistics of reference images are kept for the next time.
        tracker: receives the progress.

    Raises:
        InputError: something is missing or damaged, or samples and reference cannot be compared.
        StorageError: a store does not hold what was committed.
    """
    extractor = load_extractor(config.extractor, device())
    images, sampling = _samples(samples)
    target = _reference(reference, images.side, extractor)
    counts = {"samples": images.count, "reference": target.images.count if target.images else 0}
    counts["reference_kept"] = min(counts["reference"], KEPT_REFERENCE)
    to_measure = counts["reference_kept"] if target.statistics else counts["reference"]
    measure = Measure(extractor, tracker, to_measure + images.count, config.batch_size)
    reference_summary = _reference_summary(measure, target, root, to_measure)
    sample_summary = measure(images, keep=images.count)
    return ImageComparison(
        distance=title(extractor),
        metrics=compare(reference_summary, sample_summary, names(extractor), modes(extractor)),
        counts=counts,
        conditions=sampling | conditions(extractor) | target.conditions,
    )


def _samples(source: str) -> tuple[ImageSet, Conditions]:
    images: ImageSet
    sampling: Conditions = {}
    if _is_npz(source):
        images = Npz(source).images()
    elif _is_output(source):
        manifest = SampleManifest.read(source)
        images, sampling = StoredImages(RowReader(manifest), manifest.resolution, manifest.digest), manifest.conditions
    else:
        images = FolderImages(source)
    return images, sampling | {"count": images.count, "samples": images.digest, "resolution": images.side}


def _reference(source: str, side: int, extractor: FeatureExtractor) -> _Reference:
    if _is_npz(source):
        return _of_npz(Npz(source), side, extractor)
    images = _of_output(source, side) if _is_output(source) else FolderImages(source, side)
    _check_side(source, images, side)
    return _Reference(images, None, _conditions(images, images.digest))


def _of_npz(file: Npz, side: int, extractor: FeatureExtractor) -> _Reference:
    """Statistics in a file are taken as those of the published Inception. For other extractors images are measured."""
    images = file.images() if file.has_images else None
    if images is not None:
        _check_side(file.where, images, side)
    if file.has_statistics and extractor.published:
        return _Reference(images, file, _conditions(images, file.digest) | {"reference_statistics": "as in the file"})
    if images is None:
        raise InputError(
            f"{file.where}: has only statistics of the published Inception, which cannot be compared with features of "
            f"{extractor.name}@{extractor.sha256[:8]}; use a reference with images"
        )
    return _Reference(images, None, _conditions(images, file.digest))


def _of_output(source: str, side: int) -> ImageSet:
    stage = Manifest.read(source).stage
    if stage == SampleManifest.STAGE:
        manifest = SampleManifest.read(source)
        return StoredImages(RowReader(manifest), manifest.resolution, manifest.digest)
    if stage == LatentManifest.STAGE:
        latents = LatentManifest.read(source)
        return SplitImages(latents.parent("shards", ShardManifest), latents.split, side)
    if stage == ShardManifest.STAGE:
        return SplitImages(ShardManifest.read(source), "train", side)
    raise InputError(f"{uri.redact(source)}: is the output of {stage!r}, which has no images to compare with")


def _reference_summary(measure: Measure, target: _Reference, root: str, count: int) -> Summary:
    features = None
    if target.images is not None:
        keep = min(count, KEPT_REFERENCE)
        summary = kept_reference(measure, target.images, root, count=count, keep=keep)
        if target.statistics is None:
            return summary
        features = summary.features()
    assert target.statistics is not None
    statistics = target.statistics.statistics("features")
    assert statistics is not None
    return Summary.from_statistics(statistics, target.statistics.statistics("spatial"), features)


def _conditions(images: ImageSet | None, digest: str) -> Conditions:
    facts: Conditions = {"reference": digest, "reference_count": images.count if images else 0}
    return facts | ({"reference_crop": f"{images.crop}-{images.side}"} if images else {})


def _check_side(source: str, images: ImageSet, side: int) -> None:
    if images.side != side:
        sizes = f"the images have {images.side} px, the samples {side} px"
        raise InputError(f"{uri.redact(source)}: {sizes}; compare images of one size")


def _is_npz(source: str) -> bool:
    return uri.redact(source).endswith(".npz")


def _is_output(source: str) -> bool:
    return source.rpartition("/")[2] == MANIFEST or uri.exists(uri.join(source, MANIFEST))
