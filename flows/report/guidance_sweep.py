"""The guidance sweep: evaluations of one checkpoint that differ in nothing but the guidance of its samples."""

from collections.abc import Sequence

from dit.evaluate import MetricsManifest
from dit.metrics.comparison import NFE
from dit.report.plots import GuidanceLine
from dit.samplers.guidance import UNGUIDED
from flows.report.alike import Evaluation, alike
from storage.header import short_digest

GUIDANCE = ("guidance_", "guide")
SETTINGS = ("guidance_channels", "guidance_schedule", "guidance_interval", "guide", "guide_weights")
Fixed = tuple[str, int, str, dict[str, str | int | float]]
"""What must be equal: distance, version of the stage, digest of the checkpoint, conditions without guidance."""


def sweep_of(metrics: MetricsManifest, root: str) -> list[MetricsManifest]:
    """All finished evaluations of a root that differ from one in nothing but guidance, that one included.

    Returns:
        The given one, then the others in the order of their digests.

    Raises:
        InputError: the samples of the given one are gone.
        StorageError: the store does not answer.
    """
    return alike(metrics, root, _fixed)


def lines(evaluations: Sequence[MetricsManifest]) -> list[GuidanceLine]:
    """A line for each guidance setting with at least two scales; samples without guidance are a point of every line."""
    settings = sorted({_setting(each) for each in evaluations if each.conditions["guidance_scale"] != UNGUIDED})
    drawn = [_line(setting, evaluations) for setting in settings]
    return [line for line in drawn if len(line.scales) > 1]


def _fixed(evaluation: Evaluation) -> Fixed:
    metrics = evaluation.metrics
    conditions = {
        name: value for name, value in metrics.conditions.items() if name != NFE and not name.startswith(GUIDANCE)
    }
    return metrics.distance, metrics.version, evaluation.checkpoint.digest, conditions


def _setting(metrics: MetricsManifest) -> str:
    values = {name: str(metrics.conditions[name]) for name in SETTINGS if name in metrics.conditions}
    if "guide" in values:
        values["guide"] = short_digest(values["guide"])
    return ", ".join(f"{name.removeprefix('guidance_')} {value}" for name, value in values.items())


def _line(setting: str, evaluations: Sequence[MetricsManifest]) -> GuidanceLine:
    on_it = [each for each in evaluations if each.conditions["guidance_scale"] == UNGUIDED or _setting(each) == setting]
    at = {float(each.conditions["guidance_scale"]): each for each in reversed(on_it)}
    scales = sorted(at)
    return GuidanceLine(
        name=setting,
        scales=scales,
        distances=[at[scale].estimate for scale in scales],
        precision=[_published_or_fp32("precision", at[scale]) for scale in scales],
        recall=[_published_or_fp32("recall", at[scale]) for scale in scales],
    )


def _published_or_fp32(name: str, metrics: MetricsManifest) -> float:
    """The metric in the arithmetic of published results, if it was measured, else in float32."""
    return metrics.metrics.get(f"{name}_adm_fp16", metrics.metrics[f"{name}_fp32"])
