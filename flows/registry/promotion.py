"""Promotion to champion, by the rule or by hand, and the record of every decision.

A version has its metrics and their conditions in the tag ``ditflow.evaluation``; a version and the champion are
compared by these tags alone. Each decision is written to a tag ``ditflow.promotion.<time>`` before the alias
``champion`` moves.
"""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from pydantic import ValidationError

from dit.metrics.comparison import Estimate, Gain, differing, gain
from flows.processes import user
from flows.registry.config import CANDIDATE, CHAMPION, PromotionRule
from flows.registry.events import emit
from flows.tracking.runs import mlflow_errors, tracking_uri
from storage.config import Config
from storage.errors import InputError

EVALUATION_TAG = "ditflow.evaluation"
PROMOTED = "ditflow.model.promoted"
"""The Prefect event of a new champion; its resource is ``ditflow.model.<name>``."""
PROMOTION_TAG = "ditflow.promotion"
"""Followed by the time of the decision, so no record overwrites another."""


class Evaluation(Config):
    """The metrics of a model version and the conditions under which they were measured, as its tag holds them."""

    distance: str
    """Name of the distance with its feature extractor, such as ``FD[demo-digits@afb07b0d]``."""
    metrics: dict[str, float]
    """By name, with the bounds of 95 % intervals as ``<name>_low`` and ``<name>_high``."""
    conditions: dict[str, str | int | float]
    """By name; see `dit.metrics.comparison.differing`."""


@dataclass(frozen=True)
class _Comparison:
    """A version compared with the champion."""

    version: int
    champion: int | None
    metric: str
    values: dict[int, dict[str, float]]
    gain: Gain | None
    """None without a champion."""

    def __str__(self) -> str:
        values = {version: Estimate.of(self.metric, evaluation) for version, evaluation in self.values.items()}
        numbers = [f"version {version}: {self.metric} {value}" for version, value in values.items()]
        return "; ".join([*numbers, str(self.gain)] if self.gain else numbers)


def apply_rule(client: MlflowClient, name: str, version: int, rule: PromotionRule) -> str:
    """Make a version champion if it satisfies the rule; return the decision and its reason in one line.

    If the metrics were measured under different conditions, the champion stays and the line says so.
    """
    champion = _champion(client, name)
    if champion == version:
        return f"{name} {version} is already the champion"
    if not _is_evaluated(client, name, version):
        return f"{name} {version} is not promoted: it has no metrics; `ditflow promote` makes it champion by hand"
    try:
        comparison = _compare(client, name, version, champion, rule)
    except InputError as error:
        _record(client, name, version, None, {"decision": "kept", "by": "rule", "why": str(error)})
        return f"{name} {version} is not promoted: {error}"
    better = comparison.gain is None or comparison.gain.exceeds(rule.min_gain)
    why = f"{rule}; {comparison}"
    _record(client, name, version, comparison, {"decision": "promoted" if better else "kept", "by": "rule", "why": why})
    if not better:
        return f"{name} {version} is not promoted: {why}"
    client.set_registered_model_alias(name, CHAMPION, str(version))
    tell_promoted(name, version, why)
    return f"{name} {version} is champion: {why}"


def promote(name: str, version: int | None, reason: str, root: str) -> str:
    """Make a version champion as a person decided; return what was done in one line.

    Args:
        name: of the registered model.
        version: its number; None for the candidate.
        reason: why, for the record.
        root: the root whose tracking store is used.

    Raises:
        InputError: there is no such version, it is champion already, or its metrics and those of the
            champion were measured under different conditions.
        DitflowError: MLflow does not answer.
    """
    client = MlflowClient(tracking_uri(root))
    with mlflow_errors(root):
        aliases = client.get_registered_model(name).aliases
        if version is None and CANDIDATE not in aliases:
            raise InputError(f"{name}: has no {CANDIDATE}; name the version to promote")
        number = int(aliases[CANDIDATE]) if version is None else version
        champion = _champion(client, name)
        if champion == number:
            raise InputError(f"{name} {number}: is already the {CHAMPION}")
        both = [each for each in (number, champion) if each is not None]
        evaluated = all(_is_evaluated(client, name, each) for each in both)
        comparison = _compare(client, name, number, champion, PromotionRule()) if evaluated else None
        _record(client, name, number, comparison, {"decision": "promoted", "by": "hand", "why": reason})
        client.set_registered_model_alias(name, CHAMPION, str(number))
    tell_promoted(name, number, f"by hand: {reason}")
    said = comparison or "not compared, since one of them has no metrics"
    return f"{name} {number} is champion; before, it was {champion or 'none'}; {said}"


def tell_promoted(name: str, version: int, why: str) -> None:
    """Emit the event of a new champion, in the background; not without a server whose automations could tell people."""
    if os.environ.get("PREFECT_API_URL"):
        emit(PROMOTED, name, {"version": version, "why": why})


def evaluation(client: MlflowClient, name: str, version: int) -> Evaluation:
    """The metrics that a version was registered with.

    Raises:
        InputError: its tags hold none.
    """
    try:
        return Evaluation.model_validate_json(client.get_model_version(name, str(version)).tags[EVALUATION_TAG])
    except (KeyError, ValidationError) as error:
        raise InputError(f"{name} {version}: has no valid tag {EVALUATION_TAG}; register it again") from error


def check_comparable(what: str, old: Evaluation, new: Evaluation) -> None:
    """Check that the evaluations of ``what`` were made under the same conditions.

    Raises:
        InputError: they were not; the line gives both values of the first condition that differs.
    """
    one, other = (dict[str, object](evaluation.conditions, distance=evaluation.distance) for evaluation in (old, new))
    differ = differing(one, other)
    if differ:
        first = differ[0]
        raise InputError(
            f"{what}: metrics under different conditions cannot be compared: {', '.join(differ)} "
            f"({first}: {one.get(first, 'none')} and {other.get(first, 'none')}); evaluate both under the same ones"
        )


def _is_evaluated(client: MlflowClient, name: str, version: int) -> bool:
    """Whether a version was registered with metrics, as that of a recipe with an extractor is."""
    return EVALUATION_TAG in client.get_model_version(name, str(version)).tags


def _champion(client: MlflowClient, name: str) -> int | None:
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if number is None else int(number)


def _compare(client: MlflowClient, name: str, version: int, champion: int | None, rule: PromotionRule) -> _Comparison:
    new = evaluation(client, name, version)
    metric = rule.metric or new.distance.partition("[")[0].lower()
    if champion is None:
        return _Comparison(version, None, metric, {version: _values(metric, new)}, None)
    old = evaluation(client, name, champion)
    check_comparable(f"{name} {champion} and {version}", old, new)
    values = {champion: _values(metric, old), version: _values(metric, new)}
    return _Comparison(version, champion, metric, values, gain(metric, rule.direction, old.metrics, new.metrics))


def _values(metric: str, evaluation: Evaluation) -> dict[str, float]:
    if metric not in evaluation.metrics:
        raise InputError(f"{metric}: no such metric; choose one of {', '.join(sorted(evaluation.metrics))}")
    names = (metric, f"{metric}_low", f"{metric}_high")
    return {name: evaluation.metrics[name] for name in names if name in evaluation.metrics}


def _record(
    client: MlflowClient, name: str, version: int, comparison: _Comparison | None, decision: dict[str, str]
) -> None:
    """Write the decision to a tag of the version, before the alias moves."""
    when = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    facts: dict[str, Any] = {**decision, "who": user(), "when": when, "old_champion": _champion(client, name)}
    if comparison is not None:
        facts |= {"metric": comparison.metric, "values": comparison.values}
    if comparison is not None and comparison.gain is not None:
        facts |= {"gain": comparison.gain.value, "margin": comparison.gain.margin}
    client.set_model_version_tag(name, str(version), f"{PROMOTION_TAG}.{when}", json.dumps(facts))
