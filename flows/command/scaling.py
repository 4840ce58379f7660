"""``ditflow scaling``: fit the Fréchet distance against compute."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flows.command.options import RECIPE, add_json, add_root, add_set, check_done, complete, preset_names
from flows.command.tables import aligned
from storage import uri

if TYPE_CHECKING:
    from flows.report.scaling import Scaling

HELP = "fit the distance against training FLOPs and GMAC over the finished runs of a sweep"
HEAD = ("run", "params M", "GMAC", "images seen", "training FLOPs", "distance (95 % interval)")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    complete(parser.add_argument("recipe", nargs="+", help=f"sweep or single recipe: {RECIPE}"), preset_names)
    add_root(parser)
    add_set(parser, "the same KEY=VALUE that the recipes were run with")
    add_json(parser)


def run(options: Namespace) -> None:
    """Fit, plot and print."""
    check_done("scaling", "evaluate", options.root, "no run has metrics below this root; run the recipes first")
    from flows.report.scaling import scaling

    result = scaling(options.recipe, options.set, options.root)
    for line in [result.as_json()] if options.json else _lines(result):
        print(line)


def _lines(result: "Scaling") -> Iterator[str]:
    yield from aligned([HEAD, *(run.cells() for run in result.runs)])
    yield ""
    for x, law in result.fits.items():
        yield f"{result.distance} of {result.runs[0].samples:,} samples against x = {x}: {law}"
    for name in result.missing:
        yield f"missing: {name} has no metrics below this root"
    yield f"picture: {uri.redact(result.picture)}"
