"""``ditflow evaluate``: a recipe's stage; or any samples against any reference, with no recipe and no server."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flows.command.stage import StageCommand
from flows.command.tables import aligned
from flows.contract import STAGES
from storage.errors import InputError

if TYPE_CHECKING:
    from dit.compare import ImageComparison

STAGE = StageCommand(STAGES["evaluate"])
HELP = f"{STAGE.HELP}; or compare any samples with any reference"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    STAGE.add_arguments(parser, optional=True)
    group = parser.add_argument_group("without a recipe", "Print the metrics of samples against a reference.")
    group.add_argument("--samples", metavar="SOURCE", help="manifest of samples, folder of images, or npz with arr_0")
    group.add_argument("--reference", metavar="SOURCE", help="npz with arr_0 or mu and sigma, manifest, or folder")


def run(options: Namespace) -> None:
    """Run a recipe's evaluate stage, or compare any samples with any reference."""
    alone = (options.samples, options.reference)
    if (options.recipe is None) != all(alone) or any(alone) != all(alone):
        raise InputError("evaluate: pass either a recipe, or --samples and --reference")
    if options.recipe:
        STAGE.run(options)
        return
    comparison = _compared(options)
    for line in [comparison.model_dump_json()] if options.json else _lines(comparison):
        print(line)


def _compared(options: Namespace) -> "ImageComparison":
    """Compare with Inception, whose weights file is in this folder, unless ``--set`` names another extractor."""
    from dit.compare import compare_images
    from dit.evaluate import EvaluateConfig
    from dit.metrics.extractors.inception import WEIGHTS
    from flows.recipe import config_alone
    from flows.tracking.progress import StageProgress
    from flows.tracking.sink import StageTracker

    inception = {"name": "inception-tf", "weights": WEIGHTS}
    config = config_alone(EvaluateConfig, "evaluate", {"extractor": inception}, options.set)
    with StageProgress("evaluate").shown() as progress:
        tracker = StageTracker(None, progress.update)
        return compare_images(options.samples, options.reference, config, root=options.root, tracker=tracker)


def _lines(comparison: "ImageComparison") -> Iterator[str]:
    """The distance's name, and one line for each metric, count and condition."""
    yield comparison.distance
    numbers = [(name, f"{value:.6g}") for name, value in comparison.metrics.items()]
    counts = [(name, f"{count:,}") for name, count in comparison.counts.items()]
    conditions = [(name, str(value)) for name, value in comparison.conditions.items()]
    yield from aligned([("", ""), *numbers, ("", ""), *counts, ("", ""), *conditions])
