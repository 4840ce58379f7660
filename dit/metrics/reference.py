"""Statistics of reference images, kept from one evaluation to the next.

They lie in ``root/references`` under a digest of all that they depend on, committed as a stage's output is.
What turns out to be damaged is taken anew.
"""

import logging

import safetensors.torch
from safetensors import SafetensorError

from dit.metrics.extractors.base import FeatureExtractor
from dit.metrics.measure import Measure
from dit.metrics.sets import ImageSet
from dit.metrics.summary import Summary
from storage import uri
from storage.config import Config
from storage.errors import DitflowError
from storage.manifest import Manifest, StageOutput, short_digest, stage_output

LOGGER = logging.getLogger(__name__)
VERSION = 1


class ReferenceConfig(Config):
    """What a reference's statistics depend on beside the images and the weights."""

    crop: str
    """What was done to make the images this size."""
    resolution: int
    """Side of the images, in pixels."""
    count: int
    """Images, the first ones."""
    kept: int
    """Of how many of them the features are kept, the first ones."""
    extractor: str
    """Name, version and preprocessing of the network."""


class ReferenceManifest(Manifest):
    """Statistics and features of reference images, as safetensors."""

    STAGE = "references"


def reference(measure: Measure, images: ImageSet, root: str, *, count: int, keep: int) -> Summary:
    """The summary of the first ``count`` images: kept from before, else taken now and kept.

    Args:
        measure: takes the features; the summary is that of its first rank.
        images: the reference.
        root: folder of all outputs.
        count: images, the first ones.
        keep: of how many the features are kept.

    Raises:
        InputError: the extractor cannot read the images, or as `ImageSet.batches`.
        StorageError: the images are not what was committed, or the disk is full.
    """
    out = _output(measure.extractor, images, root, count, keep)
    found = _kept(out) if measure.ranks.first else None
    if measure.ranks.agreed(found is not None):
        measure.passed(count)
        return found or Summary(measure.extractor.dims)
    summary = measure(images, range(count), keep=keep)
    if measure.ranks.first:
        _keep(out, summary, count)
    return summary


def _keep(out: StageOutput, summary: Summary, count: int) -> None:
    data = safetensors.torch.save(summary.tensors())
    name = f"statistics-{short_digest(uri.sha256(data))}.safetensors"  # two at once may differ in the last bit
    out.commit(ReferenceManifest, [out.put(name, data)], counts={"images": count})


def _output(extractor: FeatureExtractor, images: ImageSet, root: str, count: int, keep: int) -> StageOutput:
    network = f"{extractor.name} {extractor.version} {extractor.preprocessing}"
    config = ReferenceConfig(crop=images.crop, resolution=images.side, count=count, kept=keep, extractor=network)
    inputs = {"images": images.digest, "extractor": extractor.sha256}
    return stage_output(root, ReferenceManifest.STAGE, VERSION, config, parents={}, inputs=inputs)


def _kept(out: StageOutput) -> Summary | None:
    """What was kept, if it is whole; what is not is removed."""
    try:
        manifest = out.committed(ReferenceManifest)
        if manifest is None:
            return None
        (entry,) = manifest.files
        return Summary.of(safetensors.torch.load(manifest.read_object(entry.path)))
    except (DitflowError, SafetensorError, ValueError, KeyError) as error:
        LOGGER.warning("the reference statistics are damaged and taken anew: %s", error)
        uri.remove_tree(out.uri)
        return None
