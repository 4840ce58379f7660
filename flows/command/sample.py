"""``ditflow sample``: a recipe's stage; or straight from a checkpoint, with no recipe and no server."""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from flows.command.options import add_hints, hints
from flows.command.stage import StageCommand
from flows.contract import STAGES
from storage.errors import InputError

if TYPE_CHECKING:
    from dit.convert import Hints
    from dit.export import ModelCard
    from dit.samplers.config import SampleConfig

STAGE = StageCommand(STAGES["sample"])
HELP = f"{STAGE.HELP}; or draw from any checkpoint"
COUNT = 16


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    STAGE.add_arguments(parser, optional=True)
    text = "class to draw, by name or number; repeat it for several (default: as sample.labels says)"
    parser.add_argument("--class", dest="chosen", action="append", metavar="CLASS", help=text)
    text = f"images to draw, divided among the classes (default with --class: {COUNT})"
    parser.add_argument("--count", type=int, metavar="IMAGES", help=text)
    group = parser.add_argument_group("without a recipe", "Draw a picture and an npz file from a checkpoint.")
    text = "folder of a trained model, .pt or .safetensors file of a published DiT, or diffusers folder"
    group.add_argument("--checkpoint", metavar="SOURCE", help=text)
    group.add_argument("--out", default="samples", help="folder for samples.png and samples.npz (default: samples)")
    text = "folder, URL or hub id of the autoencoder; needed if the checkpoint does not name it"
    group.add_argument("--vae", metavar="SOURCE", help=text)
    add_hints(group)


def run(options: Namespace) -> None:
    """Run a recipe's sample stage, or draw straight from a checkpoint."""
    if (options.recipe is None) == (options.checkpoint is None):
        raise InputError("sample: pass either a recipe or --checkpoint")
    chosen = _chosen(options.chosen, options.count)
    if options.recipe:
        STAGE.run(options, chosen)
        return
    overrides, given = [*options.set, *chosen], hints(options)
    for place in draw(options.checkpoint, overrides, options.out, root=options.root, vae=options.vae, **given):
        print(place)


def _chosen(classes: Sequence[str] | None, count: int | None) -> list[str]:
    """The overrides that ``--class`` and ``--count`` stand for. Earlier classes get one image more if they must."""
    if not classes:
        return [] if count is None else [f"sample.count={count}"]
    total = max(COUNT, len(classes)) if count is None else count
    counts = {name: total // len(classes) + (place < total % len(classes)) for place, name in enumerate(classes)}
    if len(counts) < len(classes) or not all(counts.values()):
        raise InputError(f"--class: {len(classes)} classes need to differ, and --count at least one image of each")
    return [f"sample.labels={json.dumps(counts)}", f"sample.count={total}"]


def draw(
    checkpoint: str, overrides: Sequence[str], out: str, *, root: str, vae: str | None = None, **hints: Unpack["Hints"]
) -> list[str]:
    """Draw samples of any checkpoint into a folder; return the URLs of the picture and the npz.

    What was assumed about a checkpoint of others goes to stderr.

    Args:
        checkpoint: what `dit.draw.open_checkpoint` opens.
        overrides: ``sample.steps=50`` and the like; without any, 16 images with the sampler that fits.
        out: the folder.
        root: folder or URL of all outputs, where a guide is known by its MLflow run or version.
        vae: folder, URL or hub id of the autoencoder, where the checkpoint does not name it.
        hints: what the checkpoint does not record.

    Raises:
        InputError: the checkpoint, an override or the folder is wrong; the line says what.
    """
    from dit.draw import open_checkpoint, preview
    from flows.tracking.progress import StageProgress
    from flows.tracking.sink import StageTracker

    trained = open_checkpoint(checkpoint, vae=vae, **hints)
    config = _config(trained.card, overrides)
    if config.guide is not None:
        from flows.tracking.references import located  # imports MLflow, which takes seconds

        config = located(config, root)
    for note in trained.notes:
        sys.stderr.write(f"{note}\n")
    with StageProgress("sample").shown() as progress:
        return preview(trained, config, out, StageTracker(None, progress.update))


def _config(card: "ModelCard", overrides: Sequence[str]) -> "SampleConfig":
    from dit.samplers.config import SampleConfig
    from dit.samplers.table import FITTING
    from flows.recipe import config_alone

    return config_alone(SampleConfig, "sample", {"count": COUNT, **FITTING[card.diffusion.kind]}, overrides)
