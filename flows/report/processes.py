"""Other processes and samplers: evaluations of one network that was trained alike, and differ in nothing but these."""

from collections.abc import Mapping, Sequence

from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.metrics.comparison import NFE, gain
from dit.sample import SampleManifest
from dit.samplers.guide import NAME as GUIDE
from dit.samplers.table import SAMPLERS
from flows.report.alike import Evaluation, alike, training_identity
from flows.report.guidance_sweep import GUIDANCE
from flows.report.over_training import shares
from storage.header import short_digest

SAMPLER = frozenset({"sampler", NFE}).union(*(row.fields for row in SAMPLERS.values()))
"""Conditions that say how a process was reversed."""


def beside(metrics: MetricsManifest, root: str) -> list[MetricsManifest]:
    """One finished evaluation of a root for each other process, sampler and guidance of them; a given one first.

    Those of the given one's own process and sampler with other guidance are its `guidance_sweep`.

    Raises:
        InputError: samples or model of the given one are gone.
        StorageError: the store does not answer.
    """
    own = _method(metrics)
    found: dict[tuple[str, str, str], MetricsManifest] = {}
    for each in alike(metrics, root, _fixed):
        method = _method(each)
        if method[:2] != own[:2]:
            found.setdefault(method, each)
    return [metrics, *found.values()]


def table(evaluations: Sequence[MetricsManifest]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Names of the columns, and a row for each evaluation; each is compared with the first.

    Raises:
        InputError: samples or a model are gone.
    """
    first, common = evaluations[0], shares(evaluations)
    head = ("process", "sampler", "guidance", f"{first.distance} (95 % interval)", "against this run", *common)
    rows = []
    for number, each in enumerate(evaluations):
        better = str(gain(first.metric, "lower", first.metrics, each.metrics)) if number else "this run"
        values = (f"{values[number]:.4f}" for values in common.values())
        rows.append((*_method(each), str(each.estimate), better, *values))
    return head, rows


def _method(metrics: MetricsManifest) -> tuple[str, str, str]:
    """Process, sampler and guidance; of the process those fields that have another value than their default."""
    process = metrics.parent("samples", SampleManifest).parent("checkpoint", CheckpointManifest).card.diffusion
    fields = process.model_dump(exclude={"kind"}, exclude_defaults=True)
    conditions = metrics.conditions
    sampler = {name: conditions[name] for name in conditions if name in SAMPLER and name != "sampler"}
    guidance = {name.removeprefix("guidance_"): conditions[name] for name in conditions if name.startswith(GUIDANCE)}
    guidance |= {GUIDE: short_digest(str(conditions[GUIDE]))} if GUIDE in conditions else {}
    named = (f"{process.kind} {_text(fields)}", f"{conditions['sampler']} {_text(sampler)}", _text(guidance))
    return named[0].strip(), named[1].strip(), named[2]


def _text(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _of_method(condition: str) -> bool:
    return condition in SAMPLER or condition.startswith(GUIDANCE)


def _fixed(evaluation: Evaluation) -> object:
    """What must be equal: distance, version of the stage, and all conditions and training but for the method."""
    metrics, _, checkpoint = evaluation
    conditions = {name: value for name, value in metrics.conditions.items() if not _of_method(name)}
    training = training_identity(checkpoint) | {"diffusion": None}
    return metrics.distance, metrics.version, conditions, checkpoint.version, checkpoint.inputs, training
