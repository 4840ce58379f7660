"""``ditflow diff``: in what two outputs differ, and what came of it."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flows.command.options import add_json, add_output, add_root
from flows.command.tables import aligned

if TYPE_CHECKING:
    from flows.lineage import Both, Comparison

HELP = "compare two outputs: config, inputs, code, and what came of it"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_output(parser, "one")
    add_output(parser, "other")
    add_root(parser)
    add_json(parser)


def run(options: Namespace) -> None:
    """Compare the outputs, and what they were made from."""
    from flows.inventory import Inventory
    from flows.lineage import compare

    inventory = Inventory.of(options.root)
    found = compare(inventory, inventory.find(options.one), inventory.find(options.other))
    print(json.dumps(found.as_json())) if options.json else print(*_lines(found), sep="\n")


def _lines(found: "Comparison") -> Iterator[str]:
    for each in found.differences:
        one, other = each.outputs
        yield f"{one}  {other}"
        yield from _section("config", each.config)
        yield from _section("inputs", each.inputs)
        yield from _section("code", each.code)
        if one == other or not (each.config or each.inputs or each.code):
            yield "  no difference"
        yield ""
    yield "what came of it"
    yield from _section("numbers", found.numbers)
    for which, evaluations in zip(("one", "other"), found.evaluations, strict=True):
        yield from (f"  {which}: {line}" for line in evaluations)


def _section(title: str, values: "Mapping[str, Both]") -> Iterator[str]:
    rows = [[title if place == 0 else "", key, *map(_text, both)] for place, (key, both) in enumerate(values.items())]
    yield from (f"  {line}" for line in (aligned(rows) if rows else ()))


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
