"""What a run says before it starts, if it will take long."""

from dit.devices import device
from dit.ranks import cores
from flows.contract import STAGES
from flows.launch.spec import LocalLaunch
from flows.plan.estimate import estimates
from flows.plan.table import Line
from flows.recipe import Recipe

LONG = 1.0
"""Hours from which a run says how long it will take."""
SHORT = 1 / 20
"""Hours that a fast machine may need for a recipe that is not worth the seconds of measuring this one."""


def forecast(recipe: Recipe, root: str, *, force: bool = False) -> str | None:
    """The hours of a recipe that are left on this machine, in a line; None if they are few, or are spent elsewhere.

    The machine is measured, for seconds, unless even a fast one would be done soon.

    Args:
        recipe: the recipe, which `preflight` has checked.
        root: folder or URL of all outputs.
        force: whether finished stages will run again.
    """
    if not isinstance(recipe.launch, LocalLaunch) or _hours(_lines(recipe, root, fast(), force)) < SHORT:
        return None
    lines = _lines(recipe, root, {}, force)
    total, longest = _hours(lines), max(lines, key=lambda line: line.hours)
    if total < LONG:
        return None
    most = f"{longest.hours:,.1f} of them for {longest.stage} ({longest.images:,} images)"
    return f"{recipe.name}: about {total:,.1f} hours on this machine, {most}; `ditflow plan` shows each stage"


def fast() -> dict[str, float]:
    """Rates that few machines of this kind exceed."""
    flops, images, pairs = (1e15, 2e4, 1e13) if device().type == "cuda" else (1e11 * cores(), 200.0 * cores(), 1e11)
    units = {name: unit for stage in STAGES.values() for name, unit in stage.definition.rates.items()}
    return {name: flops if "FLOP" in unit else pairs if "pairs" in unit else images for name, unit in units.items()}


def _lines(recipe: Recipe, root: str, rates: dict[str, float], force: bool) -> list[Line]:
    return [each.line() for each in estimates(recipe, root, rates, force=force, checked=True)]


def _hours(lines: list[Line]) -> float:
    return sum(line.hours for line in lines)
