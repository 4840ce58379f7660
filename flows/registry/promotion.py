"""Who is champion: the rule that a candidate must satisfy, and the record of every decision."""

import getpass
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from pydantic import ValidationError

from dit.metrics.comparison import Estimate, Gain, differing, gain
from flows.registry.config import CANDIDATE, CHAMPION, PromotionRule
from flows.tracking.runs import tracking_uri
from storage import uri
from storage.config import Config
from storage.errors import DitflowError, InputError, one_line

EVALUATION_TAG = "ditflow.evaluation"
PROMOTION_TAG = "ditflow.promotion"
"""Followed by the time, so that the record of a decision is never written over."""


class Evaluation(Config):
    """The numbers of a model version and what they may be compared under, as kept in its tags."""

    distance: str
    """Name of the distance with its feature space."""
    metrics: dict[str, float]
    conditions: dict[str, str | int | float]


@dataclass(frozen=True)
class _Match:
    """A version against the champion."""

    version: int
    champion: int | None
    metric: str
    values: dict[int, dict[str, float]]
    gain: Gain | None
    """None without a champion."""

    def __str__(self) -> str:
        values = {version: Estimate.of(self.metric, found) for version, found in self.values.items()}
        numbers = [f"version {version}: {self.metric} {value}" for version, value in values.items()]
        return "; ".join([*numbers, str(self.gain)] if self.gain else numbers)


def consider(client: MlflowClient, name: str, version: int, rule: PromotionRule) -> str:
    """Make a version champion if the rule says so; return what was decided, and why, in one line.

    Numbers under different conditions are not compared: then the champion stays, and the line says so.
    """
    champion = _champion(client, name)
    if champion == version:
        return f"{name} {version} is the champion already"
    try:
        match = _match(client, name, version, champion, rule)
    except InputError as error:
        _record(client, name, version, None, {"decision": "kept", "by": "rule", "why": str(error)})
        return f"{name} {version} is not promoted: {error}"
    better = match.gain is None or match.gain.exceeds(rule.min_gain)
    why = f"{rule}; {match}"
    _record(client, name, version, match, {"decision": "promoted" if better else "kept", "by": "rule", "why": why})
    if not better:
        return f"{name} {version} is not promoted: {why}"
    client.set_registered_model_alias(name, CHAMPION, str(version))
    return f"{name} {version} is champion: {why}"


def promote(name: str, version: int | None, reason: str, root: str) -> str:
    """Make a version champion because a person says so; return what was done in one line.

    Args:
        name: of the registered model.
        version: None for the candidate.
        reason: why, for the record.
        root: where the tracking store is found.

    Raises:
        InputError: there is no such version, it is champion already, or its numbers and those of the
            champion were taken under different conditions.
        DitflowError: MLflow is away.
    """
    client = MlflowClient(tracking_uri(root))
    with answering(root):
        aliases = client.get_registered_model(name).aliases
        if version is None and CANDIDATE not in aliases:
            raise InputError(f"{name}: has no {CANDIDATE}; name the version to promote")
        number = int(aliases[CANDIDATE]) if version is None else version
        champion = _champion(client, name)
        if champion == number:
            raise InputError(f"{name} {number}: is the {CHAMPION} already")
        match = _match(client, name, number, champion, PromotionRule())
        _record(client, name, number, match, {"decision": "promoted", "by": "hand", "why": reason})
        client.set_registered_model_alias(name, CHAMPION, str(number))
    return f"{name} {number} is champion, before it was {champion or 'none'}; {match}"


@contextmanager
def answering(root: str) -> Iterator[None]:
    """Within it MLflow's errors are lines for people.

    Raises:
        InputError: there is no such model or version.
        DitflowError: MLflow is away.
    """
    where = uri.redact(tracking_uri(root))
    try:
        yield
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise InputError(f"{where}: {one_line(error)}") from error
        raise DitflowError(f"{where}: MLflow does not answer ({one_line(error)})") from error


def evaluation(client: MlflowClient, name: str, version: int) -> Evaluation:
    """The numbers that a version was registered with.

    Raises:
        InputError: it was registered without.
    """
    try:
        return Evaluation.model_validate_json(client.get_model_version(name, str(version)).tags[EVALUATION_TAG])
    except (KeyError, ValidationError) as error:
        raise InputError(f"{name} {version}: its tags tell no evaluation; register it again") from error


def comparable(what: str, old: Evaluation, new: Evaluation) -> None:
    """See that numbers were taken under the same conditions.

    Raises:
        InputError: they were not; the line says of what, and names the first condition that differs.
    """
    one, other = (dict[str, object](found.conditions, distance=found.distance) for found in (old, new))
    differ = differing(one, other)
    if differ:
        first = differ[0]
        raise InputError(
            f"{what}: numbers under different conditions do not compare: {', '.join(differ)} "
            f"({first}: {one.get(first, 'none')} and {other.get(first, 'none')}); evaluate both alike"
        )


def _champion(client: MlflowClient, name: str) -> int | None:
    found = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if found is None else int(found)


def _match(client: MlflowClient, name: str, version: int, champion: int | None, rule: PromotionRule) -> _Match:
    new = evaluation(client, name, version)
    metric = rule.metric or new.distance.partition("[")[0].lower()
    if champion is None:
        return _Match(version, None, metric, {version: _of(metric, new)}, None)
    old = evaluation(client, name, champion)
    comparable(f"{name} {champion} and {version}", old, new)
    values = {champion: _of(metric, old), version: _of(metric, new)}
    return _Match(version, champion, metric, values, gain(metric, rule.direction, old.metrics, new.metrics))


def _of(metric: str, found: Evaluation) -> dict[str, float]:
    if metric not in found.metrics:
        raise InputError(f"{metric}: no such metric; there are {', '.join(sorted(found.metrics))}")
    names = (metric, f"{metric}_low", f"{metric}_high")
    return {name: found.metrics[name] for name in names if name in found.metrics}


def _record(client: MlflowClient, name: str, version: int, match: _Match | None, decision: dict[str, str]) -> None:
    """Leave the decision in a tag of the version, before anything is changed."""
    when = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    facts: dict[str, Any] = {**decision, "who": _user(), "when": when, "old_champion": _champion(client, name)}
    if match is not None:
        facts |= {"metric": match.metric, "values": match.values}
    if match is not None and match.gain is not None:
        facts |= {"gain": match.gain.value, "margin": match.gain.margin}
    client.set_model_version_tag(name, str(version), f"{PROMOTION_TAG}.{when}", json.dumps(facts))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())
