"""Evaluations of one checkpoint that differ in nothing but how its samples were guided."""

import logging
from collections.abc import Iterator, Sequence

from dit.evaluate import MetricsManifest
from dit.report.plots import GuidanceLine
from dit.sample import SampleManifest
from dit.samplers.guidance import UNGUIDED
from storage.errors import InputError
from storage.manifest import finished_outputs

LOGGER = logging.getLogger(__name__)
GUIDANCE = "guidance_"
HOW = ("channels", "schedule", "interval")
Fixed = tuple[str, int, str, dict[str, str | int | float]]
"""What must be the same: distance, version of the stage, digest of the checkpoint, conditions."""


def alike(found: MetricsManifest, root: str) -> list[MetricsManifest]:
    """All finished evaluations below a root of the same checkpoint under the same conditions, guidance aside.

    Returns:
        Them, in the order of their digests, the given one included.

    Raises:
        InputError: the samples behind the given one are gone.
        StorageError: the store does not answer.
    """
    own, others = _fixed(found), _evaluations(root, but=found.digest)
    return sorted([found, *(each for each, fixed in others if fixed == own)], key=lambda each: each.digest)


def lines(evaluations: Sequence[MetricsManifest]) -> list[GuidanceLine]:
    """A line for each way of guiding that has two scales at least; samples without guidance are on all of them."""
    ways = sorted({_way(each) for each in evaluations if each.conditions["guidance_scale"] != UNGUIDED})
    drawn = [_line(way, evaluations) for way in ways]
    return [line for line in drawn if len(line.scales) > 1]


def _evaluations(root: str, but: str) -> Iterator[tuple[MetricsManifest, Fixed]]:
    """All but one of those that are finished, each with what must be the same."""
    excluded = MetricsManifest.folder(root, but)
    for folder in finished_outputs(root, MetricsManifest.STAGE):
        if folder != excluded:
            try:
                found = MetricsManifest.read(folder)
                yield found, _fixed(found)
            except InputError as error:
                LOGGER.warning("not among the guidance scales: %s", error)


def _fixed(found: MetricsManifest) -> Fixed:
    conditions = {name: value for name, value in found.conditions.items() if not name.startswith(GUIDANCE)}
    checkpoint = found.parent("samples", SampleManifest).parents["checkpoint"]
    return found.distance, found.version, checkpoint.digest, conditions


def _way(found: MetricsManifest) -> str:
    said = {name: found.conditions.get(f"{GUIDANCE}{name}") for name in HOW}
    return ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)


def _line(way: str, evaluations: Sequence[MetricsManifest]) -> GuidanceLine:
    on_it = [each for each in evaluations if each.conditions["guidance_scale"] == UNGUIDED or _way(each) == way]
    at = {float(each.conditions["guidance_scale"]): each for each in on_it}
    scales = sorted(at)
    return GuidanceLine(
        name=way,
        scales=scales,
        distances=[at[scale].estimate for scale in scales],
        precision=[_published_or_fp32("precision", at[scale]) for scale in scales],
        recall=[_published_or_fp32("recall", at[scale]) for scale in scales],
    )


def _published_or_fp32(name: str, found: MetricsManifest) -> float:
    """In the precision of the published numbers where there is one."""
    return found.metrics.get(f"{name}_adm_fp16", found.metrics[f"{name}_fp32"])
