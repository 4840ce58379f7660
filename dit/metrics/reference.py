"""Statistics of reference images, kept from one evaluation to the next.

They are stored in ``root/references`` under a digest of all that they depend on, and committed like the output of a
stage. Damaged ones are measured again.
"""

import logging
from contextlib import nullcontext

import safetensors.torch
from safetensors import SafetensorError

from dit.metrics.extractors.base import FeatureExtractor
from dit.metrics.measure import Measure
from dit.metrics.sets import ImageSet
from dit.metrics.summary import Summary
from storage import uri
from storage.config import Config
from storage.errors import DitflowError
from storage.header import short_digest
from storage.manifest import Manifest, StageOutput, stage_output
from storage.rows.cache import making

LOGGER = logging.getLogger(__name__)
VERSION = 1


class ReferenceConfig(Config):
    """What the statistics of a reference depend on, besides the images and the weights."""

    crop: str
    """Id of the crop of the images."""
    resolution: int
    """Side of the images, in pixels."""
    count: int
    """Number of images, the first ones."""
    kept: int
    """Number of images, the first ones, whose features are kept."""
    extractor: str
    """Name, version and preprocessing of the extractor."""


class ReferenceManifest(Manifest):
    """Statistics and features of reference images, as safetensors."""

    STAGE = "references"


def reference(measure: Measure, images: ImageSet, root: str, *, count: int, keep: int) -> Summary:
    """The summary of the first ``count`` images: the kept one if there is one, else measured now and kept.

    Args:
        measure: measures images; only its first rank's summary is complete.
        images: the reference.
        root: folder of all outputs.
        count: number of images, the first ones.
        keep: number of images, the first ones, whose features are kept.

    Raises:
        InputError: the extractor cannot read the images, or as `ImageSet.batches`.
        StorageError: the images are not what was committed, or the disk is full.
    """
    out = _output(measure.extractor, images, root, count, keep)
    with making(out.uri) if measure.ranks.world_size == 1 else nullcontext():  # other ranks would not wait long enough
        found = _kept(out) if measure.ranks.first else None
        if measure.ranks.agreed(found is not None):
            measure.advance(count)
            return found or Summary(measure.extractor.dims)
        summary = measure(images, range(count), keep=keep)
        if measure.ranks.first:
            _keep(out, summary, count)
        return summary


def kept(
    extractor: FeatureExtractor, images: ImageSet, root: str, *, count: int, keep: int
) -> ReferenceManifest | None:
    """The output that holds the statistics of `reference`; None if it is gone. Arguments as there."""
    return _output(extractor, images, root, count, keep).committed(ReferenceManifest)


def _keep(out: StageOutput, summary: Summary, count: int) -> None:
    data = safetensors.torch.save(summary.tensors())
    name = f"statistics-{short_digest(uri.sha256(data))}.safetensors"  # two processes may differ in the last bit
    out.commit(ReferenceManifest, [out.put(name, data)], counts={"images": count})


def _output(extractor: FeatureExtractor, images: ImageSet, root: str, count: int, keep: int) -> StageOutput:
    network = f"{extractor.name} {extractor.version} {extractor.preprocessing}"
    config = ReferenceConfig(crop=images.crop, resolution=images.side, count=count, kept=keep, extractor=network)
    inputs = {"images": images.digest, "extractor": extractor.sha256}
    return stage_output(root, ReferenceManifest.STAGE, VERSION, config, parents={}, inputs=inputs)


def _kept(out: StageOutput) -> Summary | None:
    """The kept summary; a damaged one is removed."""
    try:
        manifest = out.committed(ReferenceManifest)
        if manifest is None:
            return None
        (entry,) = manifest.files
        return Summary.from_tensors(safetensors.torch.load(manifest.read_object(entry.path)))
    except (DitflowError, SafetensorError, ValueError, KeyError) as error:
        LOGGER.warning("reference statistics: damaged, measuring again: %s", error)
        uri.remove_tree(out.uri, out.root)
        return None
