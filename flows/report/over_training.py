"""The metrics over training: evaluations of runs that differ in nothing but their steps, such as milestones."""

from collections.abc import Sequence

import numpy as np

from dit.evaluate import MetricsManifest
from dit.metrics.comparison import NFE
from dit.sample import SampleManifest
from flows.report.alike import Evaluation, alike, training_identity
from storage.images.grid import image_grid
from storage.rows.store import RowReader

STEPS = "training_steps"
SHARES = ("precision", "recall", "recognised")
"""What metrics from 0 to 1 begin with."""


def series_of(metrics: MetricsManifest, root: str) -> list[MetricsManifest]:
    """All finished evaluations of a root that differ from one in nothing but the steps of training, in their order.

    Raises:
        InputError: samples or model of the given one are gone.
        StorageError: the store does not answer.
    """
    at = {steps_of(each): each for each in reversed(alike(metrics, root, _fixed))}  # so the given one is in it
    return [at[steps] for steps in sorted(at)]


def steps_of(metrics: MetricsManifest) -> int:
    """Training steps of the model that was evaluated."""
    return int(metrics.conditions[STEPS])


def shares(series: Sequence[MetricsManifest]) -> dict[str, list[float]]:
    """The metrics from 0 to 1 that all evaluations of a series have, by name."""
    names = [name for name in series[0].metrics if name.startswith(SHARES)]
    common = [name for name in names if all(name in each.metrics for each in series)]
    return {name: [each.metrics[name] for each in series] for name in common}


def strip(metrics: MetricsManifest, count: int) -> bytes:
    """A PNG of the first samples that were evaluated.

    Raises:
        InputError: samples are gone.
        StorageError: samples are not what was committed.
    """
    samples = metrics.parent("samples", SampleManifest)
    first = np.arange(min(samples.counts["images"], count))
    return image_grid(RowReader(samples).take("image", first), len(first), gap=2)


def _fixed(evaluation: Evaluation) -> object:
    """What must be equal: distance, version of the stage, conditions and training without the number of steps."""
    metrics, _, checkpoint = evaluation
    conditions = {name: value for name, value in metrics.conditions.items() if name not in {STEPS, NFE}}
    training = training_identity(checkpoint) | {"steps": None}
    return metrics.distance, metrics.version, conditions, checkpoint.version, checkpoint.inputs, training
