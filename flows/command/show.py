"""``ditflow show``: all about one output."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from flows.command.options import add_json, add_output, add_root
from flows.command.tables import age, aligned, cost, size
from storage import uri

HELP = "show one output: its config, inputs and numbers, and who uses it"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_output(parser, "output")
    add_root(parser)
    add_json(parser)


def run(options: Namespace) -> None:
    """Show the output."""
    from flows.inventory import Inventory, details

    inventory = Inventory.of(options.root)
    found = details(inventory, inventory.find(options.output))
    print(json.dumps(found)) if options.json else print(*_lines(found), sep="\n")


def _lines(found: dict[str, Any]) -> Iterator[str]:
    import yaml

    yield found["output"] + (f"  {found['state']}" if found["state"] != "finished" else "")
    yield from filter(None, [found["url"], found["fault"], uri.printable(", ".join(found["names"]))])
    when = f"made {age(datetime.fromisoformat(found['created']))} ago" if found["created"] else "not finished"
    who = f"{found['recipe'] or 'a stage alone'}, with code {found['code_version'] or 'unknown'}"
    yield uri.printable(f"{when} by {who}")
    yield f"{size(found['size'] or 0)} committed, {size(found['on_disk'])} on disk in {found['objects']:,} objects"
    if found["cost"]:
        yield cost(found["cost"])
    yield from _section("made from", [[name, place] for name, place in found["inputs"].items()])
    yield from _section("used by", [[each["output"], each["recipe"], each["number"]] for each in found["used_by"]])
    numbers = found["counts"] | found["metrics"]
    yield from _section("numbers", [[name, f"{value:,.6g}"] for name, value in numbers.items()])
    yield from ("", "config")
    yield yaml.safe_dump(found["config"], sort_keys=False, allow_unicode=True).rstrip()


def _section(title: str, rows: list[list[str]]) -> Iterator[str]:
    if rows:
        yield from ("", title, *(f"  {line}" for line in aligned(rows)))
