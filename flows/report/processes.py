"""Other processes and samplers: evaluations of one network that was trained alike, and differ in nothing but these."""

from collections.abc import Sequence

from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.metrics.comparison import NFE, gain
from dit.sample import SampleManifest
from dit.samplers.table import SAMPLERS
from flows.report.alike import Evaluation, alike, training_identity
from flows.report.over_training import shares

METHOD = frozenset({"sampler", NFE}).union(*(row.fields for row in SAMPLERS.values()))
"""Conditions that say how a process was reversed."""


def beside(metrics: MetricsManifest, root: str) -> list[MetricsManifest]:
    """One finished evaluation of a root for each process and sampler, which differ in nothing else; a given one first.

    Raises:
        InputError: samples or model of the given one are gone.
        StorageError: the store does not answer.
    """
    found: dict[tuple[str, str], MetricsManifest] = {}
    for each in alike(metrics, root, _fixed):
        found.setdefault((_process(each), _sampler(each)), each)
    return list(found.values())


def table(evaluations: Sequence[MetricsManifest]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Names of the columns, and a row for each evaluation; each is compared with the first.

    Raises:
        InputError: samples or a model are gone.
    """
    first, common = evaluations[0], shares(evaluations)
    head = ("process", "sampler", f"{first.distance} (95 % interval)", "against this run", *common)
    rows = []
    for number, each in enumerate(evaluations):
        better = str(gain(first.metric, "lower", first.metrics, each.metrics)) if number else "this run"
        values = (f"{values[number]:.4f}" for values in common.values())
        rows.append((_process(each), _sampler(each), str(each.estimate), better, *values))
    return head, rows


def _process(metrics: MetricsManifest) -> str:
    """The process, with its fields that have another value than their default."""
    process = metrics.parent("samples", SampleManifest).parent("checkpoint", CheckpointManifest).card.diffusion
    fields = process.model_dump(exclude={"kind"}, exclude_defaults=True)
    return ", ".join([process.kind, *(f"{name} {value}" for name, value in fields.items())])


def _sampler(metrics: MetricsManifest) -> str:
    values = metrics.conditions
    others = [f"{name} {values[name]}" for name in values if name in METHOD and name != "sampler"]
    return ", ".join([str(values["sampler"]), *others])


def _fixed(evaluation: Evaluation) -> object:
    """What must be equal: distance, version of the stage, conditions and training without process and sampler."""
    metrics, _, checkpoint = evaluation
    conditions = {name: value for name, value in metrics.conditions.items() if name not in METHOD}
    training = training_identity(checkpoint) | {"diffusion": None}
    return metrics.distance, metrics.version, conditions, checkpoint.version, checkpoint.inputs, training
