"""What MLflow shows of a run in words: the notes of stages and pipelines, in Markdown."""

from collections.abc import Mapping, Sequence

from dit.metrics.comparison import Estimate
from flows.contract import STAGES
from storage import uri
from storage.cost import Cost
from storage.header import Header, short_digest
from storage.manifest import Manifest

_BOUNDS = ("_low", "_high")
HOUR, GIB, KWH = 3600, 2**30, 3.6e6


def stage_note(header: Header, made: Manifest | None = None) -> str:
    """What a stage does, from what, and what it has made if it is done."""
    help_text = STAGES[header.stage].help if header.stage in STAGES else header.stage
    sources = ", ".join(f"{name} `{short_digest(digest)}`" for name, digest in header.inputs.items())
    parts = [f"**{header.stage}**: {help_text}.", f"From {sources}." if sources else ""]
    if made is not None:
        what = f"Made {counted(made.counts)}" if made.counts else "Made it"
        parts += [f"{what}, in `{uri.redact(made.uri)}`.", numbers(made.metrics)]
        parts += [f"Cost {spent(made.cost)}."] if made.cost else []
    if header.provenance.prefect_flow_run_url:
        parts.append(f"[Prefect flow run]({header.provenance.prefect_flow_run_url})")
    return "\n\n".join(filter(None, parts))


def pipeline_note(stages: Sequence[Manifest]) -> str:
    """The numbers of a finished pipeline, what its stages have made and what that cost."""
    times = [_time(made.cost) if made.cost else "" for made in stages]
    rows = [
        f"| {made.stage} | {counted(made.counts)} | {time} | `{uri.redact(made.uri)}` |"
        for made, time in zip(stages, times, strict=True)
    ]
    table = "\n".join(["| stage | made | time of devices | output |", "|---|---|---|---|", *rows])
    return "\n\n".join(
        filter(None, [numbers(headline(stages)), table, "The artifacts `report.html` and `samples.png` show it."])
    )


def headline(stages: Sequence[Manifest]) -> dict[str, float]:
    """The metrics of all stages, those of the last first; a later stage replaces those of the same name."""
    found: dict[str, float] = {}
    for made in reversed(stages):
        found = found | {name: value for name, value in made.metrics.items() if name not in found}
    return found


def spent(cost: Cost) -> str:
    """Such as ``8.1 h of devices (NVIDIA H200), peak memory 71 GiB, 5.2 kWh, 2 attempts``."""
    joules = cost.energy_joules
    energy = f"energy not known: {cost.energy_unread}" if joules is None else f"{joules / KWH:,.3g} kWh"
    devices = f"{_time(cost)} of devices ({', '.join(cost.devices)})"
    parts = [devices, f"peak memory {cost.peak_memory / GIB:.3g} GiB", energy]
    return ", ".join([*parts, *([f"{cost.attempts} attempts"] if cost.attempts > 1 else [])])


def _time(cost: Cost) -> str:
    seconds = cost.device_seconds
    return f"{seconds:,.1f} s" if seconds < HOUR else f"{seconds / HOUR:,.1f} h"


def cost_metrics(costs: Sequence[Cost]) -> dict[str, float]:
    """What outputs have cost together, as metrics. Their energy is one only if it is known of all; none without any."""
    if not costs:
        return {}
    joules = [cost.energy_joules for cost in costs if cost.energy_joules is not None]
    return {
        "cost.device_seconds": sum(cost.device_seconds for cost in costs),
        "cost.peak_memory_gib": max(cost.peak_memory for cost in costs) / GIB,
        **({"cost.energy_kwh": sum(joules) / KWH} if len(joules) == len(costs) else {}),
    }


def counted(counts: Mapping[str, int]) -> str:
    """Such as ``1,797 images, 4 shards``."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count)


def numbers(metrics: Mapping[str, float]) -> str:
    """A table of metrics, with their 95 % intervals; empty without any."""
    names = [name for name in metrics if not name.endswith(_BOUNDS)]
    rows = [f"| {name} | {Estimate.of(name, metrics)} |" for name in names]
    return "\n".join(["| metric | value (95 % interval) |", "|---|---|", *rows]) if rows else ""
