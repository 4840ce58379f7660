"""``ditflow tree``: what an output was made from, and what was made of it."""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from flows.command.options import add_json, add_output, add_root

HELP = "show all that an output was made from, and all that was made of it"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_output(parser, "output")
    add_root(parser)
    add_json(parser)


def run(options: Namespace) -> None:
    """Show both trees."""
    from flows.inventory import Inventory
    from flows.lineage import made_from, used_by

    inventory = Inventory.of(options.root)
    output = inventory.find(options.output)
    trees = {"made from": made_from(inventory, output), "used by": used_by(inventory, output)}
    if options.json:
        print(json.dumps({name.replace(" ", "_"): asdict(tree) for name, tree in trees.items()}))
        return
    for name, tree in trees.items():
        print(f"{name}", *(f"  {line}" for line in tree.lines()), sep="\n")
