"""Samples from anywhere against a reference from anywhere, with no recipe and no server."""

from collections.abc import Iterator, Sequence

from dit.compare import Judgement, judge
from dit.evaluate import EvaluateConfig
from dit.metrics.extractors.inception import WEIGHTS
from flows.recipe import config_alone
from flows.tracking.progress import StageProgress
from flows.tracking.sink import StageTracker


def judged(samples: str, reference: str, overrides: Sequence[str], root: str, *, as_json: bool = False) -> str:
    """The numbers of `dit.compare.judge` as a text, with Inception from this folder unless the overrides say otherwise.

    Args:
        samples: what to judge.
        reference: what to compare with.
        overrides: ``evaluate.extractor.weights=...`` and the like.
        root: where statistics of reference images are kept.
        as_json: one JSON object instead of a table.

    Raises:
        InputError: something is wrong or missing, or the two do not compare; the line says what.
    """
    inception = {"name": "inception-tf", "weights": WEIGHTS}
    config = config_alone(EvaluateConfig, "evaluate", {"extractor": inception}, overrides)
    with StageProgress("evaluate").shown() as progress:
        found = judge(samples, reference, config, root=root, tracker=StageTracker(None, progress.update))
    return found.model_dump_json() if as_json else "\n".join(_table(found))


def _table(found: Judgement) -> Iterator[str]:
    """The distance's name, the metrics, and all conditions, a line each."""
    numbers = {name: f"{value:.6g}" for name, value in found.metrics.items()}
    facts = {name: f"{count:,}" for name, count in found.counts.items()}
    conditions = {name: str(value) for name, value in found.conditions.items()}
    width = max(map(len, [*numbers, *facts, *conditions]))
    yield found.distance
    for part in (numbers, facts, conditions):
        yield ""
        for name, value in part.items():
            yield f"{name.ljust(width)}  {value}"
