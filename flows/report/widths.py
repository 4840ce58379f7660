"""The metrics over the width of the average: evaluations of averages of one training that differ in nothing else."""

from collections.abc import Sequence

from dit.evaluate import MetricsManifest
from flows.report.alike import Evaluation, alike

WIDTH = "ema_std"
"""The condition that averages made afterwards have."""


def series_of(evaluations: Sequence[MetricsManifest], root: str) -> list[MetricsManifest]:
    """All finished evaluations of a root that differ from the first average's in nothing but the width, in its order.

    Empty if none of the given ones is of an average, or there is no other width.

    Raises:
        InputError: samples or model of the given ones are gone.
        StorageError: the store does not answer.
    """
    first = next((each for each in evaluations if WIDTH in each.conditions), None)
    if first is None:
        return []
    at = {width_of(each): each for each in reversed(alike(first, root, _fixed))}  # so the given one is in it
    return [at[width] for width in sorted(at)] if len(at) > 1 else []


def width_of(metrics: MetricsManifest) -> float:
    """Relative width of the average that was evaluated."""
    return float(metrics.conditions[WIDTH])


def _fixed(evaluation: Evaluation) -> object:
    """What must be equal: distance, version of the stage, conditions without the width, and what was averaged."""
    metrics, _, checkpoint = evaluation
    conditions = {name: value for name, value in metrics.conditions.items() if name != WIDTH}
    return metrics.distance, metrics.version, conditions, checkpoint.stage, checkpoint.version, checkpoint.inputs
