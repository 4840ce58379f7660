"""Samples from anywhere against a reference from anywhere: numbers without a pipeline."""

from dataclasses import dataclass

from dit.devices import device
from dit.evaluate import EvaluateConfig
from dit.metrics.extractors.base import FeatureExtractor
from dit.metrics.extractors.load import load_extractor
from dit.metrics.measure import KEPT_REFERENCE, Measure, conditions, modes, names, title
from dit.metrics.npz import Npz
from dit.metrics.reference import reference as kept_reference
from dit.metrics.sets import FolderImages, ImageSet, SplitImages, StoredImages
from dit.metrics.summary import Summary, compare
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


class Judgement(Config):
    """Numbers, and everything they depend on."""

    distance: str
    """Name of the distance with its feature space."""
    metrics: dict[str, float]
    counts: dict[str, int]
    conditions: Conditions
    """What the numbers must be published with."""


@dataclass(frozen=True)
class _Reference:
    """What samples are compared with: images, or statistics of images that are not there, or both."""

    images: ImageSet | None
    statistics: Npz | None
    conditions: Conditions


def judge(samples: str, reference: str, config: EvaluateConfig, *, root: str, tracker: Tracker) -> Judgement:
    """Compare samples with a reference, by the metrics of `dit.metrics.summary.compare`.

    Args:
        samples: manifest of a sample store or its folder, folder of images, or npz with ``arr_0``.
        reference: npz with images, statistics or both; manifest of shards, latents or samples; folder of
            images, which are cropped to the samples' size as for training.
        config: the extractor.
        root: where statistics of reference images are kept for the next time.
        tracker: learns how far it is.

    Raises:
        InputError: something is missing, broken or no such thing, or the two do not compare.
        StorageError: a store does not hold what was committed.
    """
    extractor = load_extractor(config.extractor, device())
    found, drawn = _samples(samples)
    against = _reference(reference, found.side, extractor)
    counts = {"samples": found.count, "reference": against.images.count if against.images else 0}
    counts["reference_kept"] = min(counts["reference"], KEPT_REFERENCE)
    passed = counts["reference_kept"] if against.statistics else counts["reference"]
    measure = Measure(extractor, tracker, passed + found.count, config.batch_size)
    near = _near(measure, against, root, passed)
    far = measure(found, keep=found.count)
    return Judgement(
        distance=title(extractor),
        metrics=compare(near, far, names(extractor), modes(extractor)),
        counts=counts,
        conditions=drawn | conditions(extractor) | against.conditions,
    )


def _samples(source: str) -> tuple[ImageSet, Conditions]:
    images: ImageSet
    known: Conditions = {}
    if _is_npz(source):
        images = Npz(source).images()
    elif _is_output(source):
        manifest = SampleManifest.read(source)
        images, known = StoredImages(RowReader(manifest), manifest.resolution, manifest.digest), manifest.conditions
    else:
        images = FolderImages(source)
    return images, known | {"count": images.count, "samples": images.digest, "resolution": images.side}


def _reference(source: str, side: int, extractor: FeatureExtractor) -> _Reference:
    if _is_npz(source):
        return _of_npz(Npz(source), side, extractor)
    images = _of_output(source, side) if _is_output(source) else FolderImages(source, side)
    _check_side(source, images, side)
    return _Reference(images, None, _told(images, images.digest))


def _of_npz(file: Npz, side: int, extractor: FeatureExtractor) -> _Reference:
    """Statistics are those of the published Inception, whose files do not say so; else the images are measured."""
    images = file.images() if file.has_images else None
    if images is not None:
        _check_side(file.where, images, side)
    if file.has_statistics and extractor.published:
        return _Reference(images, file, _told(images, file.digest) | {"reference_statistics": "as in the file"})
    if images is None:
        raise InputError(
            f"{file.where}: holds statistics of the published Inception and no images; features of "
            f"{extractor.name}@{extractor.sha256[:8]} do not compare with them"
        )
    return _Reference(images, None, _told(images, file.digest))


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
    raise InputError(f"{uri.redact(source)}: holds the output of {stage!r}, and no images to compare with")


def _near(measure: Measure, against: _Reference, root: str, count: int) -> Summary:
    """The summary of the reference."""
    features = None
    if against.images is not None:
        keep = min(count, KEPT_REFERENCE)
        found = kept_reference(measure, against.images, root, count=count, keep=keep)
        if against.statistics is None:
            return found
        features = found.features()
    assert against.statistics is not None
    statistics = against.statistics.statistics("features")
    assert statistics is not None
    return Summary.given(statistics, against.statistics.statistics("spatial"), features)


def _told(images: ImageSet | None, digest: str) -> Conditions:
    facts: Conditions = {"reference": digest, "reference_count": images.count if images else 0}
    return facts | ({"reference_crop": f"{images.crop}-{images.side}"} if images else {})


def _check_side(source: str, images: ImageSet, side: int) -> None:
    if images.side != side:
        sizes = f"images of {images.side} px, and samples of {side} px do not compare with them"
        raise InputError(f"{uri.redact(source)}: {sizes}; draw or save them at one size")


def _is_npz(source: str) -> bool:
    return uri.redact(source).endswith(".npz")


def _is_output(source: str) -> bool:
    return source.rpartition("/")[2] == MANIFEST or uri.exists(uri.join(source, MANIFEST))
