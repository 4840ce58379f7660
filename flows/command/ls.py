"""``ditflow ls``: the outputs of a root, and what they have cost."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from flows.command.options import add_json, add_root
from flows.command.tables import age, aligned, size

if TYPE_CHECKING:
    from storage.root import Output

HELP = "list the outputs of a root: recipe, stage, digits, age, size, a number, names"
TABLE = ("recipe", "stage", "output", "age", "size", "number", "names")
COSTS = ("recipe", "month", "outputs", "measured", "device-hours", "peak GiB", "kWh", "known for")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_root(parser)
    text = "what they have cost instead, by recipe and month: time of devices, memory, energy where it could be read"
    parser.add_argument("--cost", action="store_true", help=text)
    add_json(parser)


def run(options: Namespace) -> None:
    """List the outputs, the newest last, or their costs."""
    from flows.inventory import Inventory, row

    inventory = Inventory.of(options.root)
    if options.cost:
        _list_costs(inventory.outputs, as_json=options.json)
        return
    rows = sorted((row(inventory, each) for each in inventory.outputs), key=lambda each: str(_when(each)))
    if options.json:
        for each in rows:
            print(json.dumps(each))
    elif rows:
        print(*aligned([TABLE, *map(_cells, rows)], numbers=(3, 4)), sep="\n")


def _list_costs(outputs: Sequence["Output"], *, as_json: bool) -> None:
    from flows.costs import everything, summary

    lines = summary(outputs)
    if as_json:
        for line in lines:
            print(json.dumps(line))
    elif lines:
        rows = [(line["recipe"] or "-", line["month"], *_cost_cells(line)) for line in lines]
        rows.append(("all", "", *_cost_cells(everything(lines))))
        print(*aligned([COSTS, *rows], numbers=range(2, 8)), sep="\n")


def _cost_cells(line: dict[str, Any]) -> Iterator[str]:
    """The numbers of a line for a table, as `COSTS` names them."""
    seconds, read = line["device_seconds"], line["energy_device_seconds"]
    yield f"{line['outputs']:,}"
    yield f"{line['measured']:,}"
    yield f"{seconds / 3600:,.2f}"
    yield f"{line['peak_memory'] / 2**30:,.2f}"
    yield f"{line['energy_joules'] / 3.6e6:,.3f}" if read else "-"
    yield f"{100 * read / seconds:.0f} %" if seconds else "-"


def _when(row: dict[str, Any]) -> str | None:
    when: str | None = row["created"] or row["written"]
    return when


def _cells(row: dict[str, Any]) -> list[str]:
    when = _when(row)
    number = row["number"] if row["state"] == "finished" else row["state"]
    return [
        row["recipe"] or "-",
        row["stage"],
        row["output"].rpartition("/")[2],
        age(datetime.fromisoformat(when)) if when else "",
        "" if row["size"] is None else size(row["size"]),
        number,
        ", ".join(row["names"]),
    ]
