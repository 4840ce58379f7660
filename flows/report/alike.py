"""Evaluations of a root that differ from one in nothing but what a series varies."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import ValidationError

from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.sample import SampleManifest
from dit.training.config import TrainConfig
from storage import uri
from storage.archives.once import listed
from storage.errors import InputError, one_line
from storage.manifest import finished_outputs
from storage.parallel import threads

LOGGER = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """A finished evaluation and what it was made from."""

    metrics: MetricsManifest
    samples: SampleManifest
    checkpoint: CheckpointManifest


def alike(metrics: MetricsManifest, root: str, fixed: Callable[[Evaluation], object]) -> list[MetricsManifest]:
    """The finished evaluations of a root for which ``fixed`` is the same as for a given one, that one included.

    Returns:
        The given one, then the others in the order of their digests. One that cannot be read, or whose parents are
        gone, is left out with a warning.

    Raises:
        InputError: what the given one was made from is gone.
        StorageError: the store does not answer.
    """
    own = fixed(_evaluation(metrics))
    others = [each for each in listed(root, _all_of) if each.metrics.digest != metrics.digest]
    found = [each.metrics for each in others if fixed(each) == own]
    return [metrics, *sorted(found, key=lambda each: each.digest)]


def training_identity(checkpoint: CheckpointManifest) -> dict[str, Any]:
    """What the config of a training says of its output."""
    try:
        return TrainConfig.model_validate(checkpoint.config).identity()
    except ValidationError:  # of another version, with other fields
        return checkpoint.config


def _all_of(root: str) -> list[Evaluation]:
    with threads(16) as pool:
        found = pool.map(_read, finished_outputs(root, MetricsManifest.STAGE))
        return [each for each in found if each is not None]


def _read(folder: str) -> Evaluation | None:
    try:
        return _evaluation(MetricsManifest.read(folder))
    except InputError as error:
        LOGGER.warning("left out of the report: %s: %s", uri.redact(folder), one_line(error))
        return None


def _evaluation(metrics: MetricsManifest) -> Evaluation:
    samples = metrics.parent("samples", SampleManifest)
    return Evaluation(metrics, samples, samples.parent("checkpoint", CheckpointManifest))
