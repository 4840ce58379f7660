"""What the outputs of a root have cost, by recipe and month."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from flows.inventory import recipe_of
from storage.cost import parts, total
from storage.root import Output, Spent, State


def summary(outputs: Iterable[Output]) -> list[dict[str, Any]]:
    """Lines of JSON, sorted by recipe and month (UTC): that in which an output was finished, or its work last began.

    Raises:
        StorageError: the store does not answer.
    """
    found: dict[tuple[str, str], list[Spent | None]] = {}
    for output in outputs:
        when, cost = _cost(output)
        if when is not None:
            found.setdefault((recipe_of(output), f"{when:%Y-%m}"), []).append(cost)
    return [{"recipe": recipe, "month": month, **_sum(found[recipe, month])} for recipe, month in sorted(found)]


def everything(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of lines."""
    lines = list(lines)
    names = ("outputs", "measured", "device_seconds", "energy_joules", "energy_device_seconds")
    most = max((line["peak_memory"] for line in lines), default=0)
    return {name: sum(line[name] for line in lines) for name in names} | {"peak_memory": most}


def _cost(output: Output) -> tuple[datetime | None, Spent | None]:
    """When, and what an output has cost; of one that is not finished, by the records in its folder."""
    facts = output.facts
    if output.state is State.FINISHED:
        return (facts.created, facts.cost) if facts else (None, None)
    found = parts(output.url)
    cost = total(found)
    return max((part.began for part in found), default=None), Spent(**cost.model_dump()) if cost else None


def _sum(costs: list[Spent | None]) -> dict[str, Any]:
    known = [cost for cost in costs if cost is not None]
    read = [cost for cost in known if cost.energy_joules is not None]
    return {
        "outputs": len(costs),
        "measured": len(known),
        "device_seconds": sum(cost.device_seconds for cost in known),
        "peak_memory": max((cost.peak_memory for cost in known), default=0),
        "energy_joules": sum(cost.energy_joules or 0.0 for cost in read),
        "energy_device_seconds": sum(cost.device_seconds for cost in read),
    }
