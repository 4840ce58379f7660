"""``ditflow gc``: what of a root nothing needs any more, and its removal."""

import json
import math
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flows.command.options import add_json, add_root, at_least_zero
from flows.command.tables import age, aligned, size

if TYPE_CHECKING:
    from storage.collect import Garbage
    from storage.root import Output, Usage

HELP = "list what no registered version, pin, kept recipe or running work needs, and delete it with --delete"
DAYS = 7.0
_DAY = 24 * 3600.0


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--delete", action="store_true", help="delete it (default: only list it)")
    text = "keep a recipe's outputs: a preset, a YAML file, or a name that `ditflow ls` shows; repeatable"
    parser.add_argument("--keep", action="append", default=[], metavar="RECIPE", help=text)
    text = "keep outputs to which anything was written in so many days (default: %(default)g)"
    parser.add_argument("--days", type=at_least_zero, default=DAYS, help=text)
    add_root(parser)
    add_json(parser)


def run(options: Namespace) -> None:
    """List garbage, and delete it if that was asked for."""
    from flows.claims import deleting
    from flows.inventory import Inventory
    from flows.keeping import FIRST, PAGES, WORKING, reasons
    from storage.collect import delete, garbage

    with deleting(options.root) if options.delete else nullcontext():
        inventory = Inventory.of(options.root)
        why = reasons(inventory, options.keep)
        working = {key for key, reason in why.items() if reason == WORKING}
        kinds = {"pages": PAGES, "first": FIRST}
        found = garbage(inventory.outputs, why, **kinds, seconds=options.days * _DAY, working=working)
        if not options.json:
            print(*_table(found), sep="\n")
        left = delete(options.root, found, lambda _: None) if options.delete else []
    print(json.dumps(_summary(found, left, deleted=options.delete))) if options.json else print(
        _end(options, found, left)
    )


def _table(found: "Garbage") -> Iterator[str]:
    """What goes, one line for each, then by kind, and why the rest stays."""
    rows = [_cells(output, used) for output, used in found.outputs.items()]
    if rows:
        yield from aligned([("recipe", "stage", "output", "written", "size", ""), *rows], numbers=(3, 4))
        yield ""
    kinds = [[kind, f"{each['outputs']:,}", size(each["bytes"])] for kind, each in _kinds(found).items()]
    if kinds:
        yield from aligned([("kind", "goes", "size"), *kinds], numbers=(1, 2))
        yield ""
    stay = Counter(why.partition(":")[0].partition(" by ")[0] or "made into these" for why in found.kept.values())
    yield f"{len(found.kept):,} stay: {', '.join(f'{count:,} {why}' for why, count in stay.items()) or 'none'}"


def _cells(output: "Output", used: "Usage") -> list[str]:
    from flows.inventory import recipe_of
    from storage.root import State

    known = 0 < used.newest < math.inf
    written = age(datetime.fromtimestamp(used.newest, UTC)) if known else ""
    state = "" if output.state is State.FINISHED else str(output.state)
    return [recipe_of(output) or "-", output.stage, output.name, written, size(used.size), state]


def _kinds(found: "Garbage") -> dict[str, dict[str, int]]:
    """Number and bytes of the outputs of each stage, and of temporary files."""
    kinds: dict[str, dict[str, int]] = {}
    sizes = [(output.stage, used.size) for output, used in found.outputs.items()]
    for kind, count in (*sizes, *(("temporary files", count) for count in found.temporary.values())):
        each = kinds.setdefault(kind, {"outputs": 0, "bytes": 0})
        each["outputs"] += 1
        each["bytes"] += count
    return kinds


def _summary(found: "Garbage", left: list[str], *, deleted: bool) -> dict[str, Any]:
    outputs = [
        {"output": each.key, "state": str(each.state), "size": used.size} for each, used in found.outputs.items()
    ]
    return {
        "deleted": deleted,
        "outputs": outputs,
        "temporary": dict(found.temporary),
        "kinds": _kinds(found),
        "kept": dict(found.kept),
        "left": left,
    }


def _end(options: Namespace, found: "Garbage", left: list[str]) -> str:
    goes = [used.size for each, used in found.outputs.items() if each.url not in left] + [*found.temporary.values()]
    total = size(sum(goes))
    if not options.delete:
        return f"{total} can go; the same command with --delete deletes it" if goes else "nothing can go"
    lines = [f"{place}: left, since somebody has written to it just now" for place in left]
    return "\n".join([*lines, f"{total} deleted" if goes else "nothing to delete"])
