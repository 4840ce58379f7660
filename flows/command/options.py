"""Arguments that several commands share. Imports nothing heavy, so that help comes at once."""

import math
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

from storage import uri
from storage.errors import InputError
from storage.patience import STAGE_SECONDS

if TYPE_CHECKING:
    from argparse import _ActionsContainer

    from dit.convert import Hints

RECIPE = "name of a preset, or path of a YAML file"


def add_recipe(parser: ArgumentParser, *, optional: bool = False) -> None:
    """Add the recipe."""
    parser.add_argument("recipe", nargs="?" if optional else None, help=RECIPE)


def add_root(parser: ArgumentParser) -> None:
    """Add ``--root``; `check_root` checks its value."""
    default = os.environ.get("DITFLOW_ROOT", "runs")
    parser.add_argument("--root", default=default, help="folder or URL of all outputs (default: %(default)s)")


def add_set(parser: ArgumentParser, text: str = "change one value of the recipe, such as train.steps=2000") -> None:
    """Add ``--set``, which may be given several times."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"{text}; repeatable")


def add_json(parser: ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else, one object a line")


def add_running(parser: ArgumentParser) -> None:
    """Add the options of all commands that run stages."""
    add_root(parser)
    add_set(parser)
    add_json(parser)
    text = "seconds for which a stage asks an object store again that does not answer (default: %(default)s)"
    parser.add_argument("--patience", type=_seconds, default=STAGE_SECONDS, metavar="SECONDS", help=text)
    text = "run finished stages again, into new folders; an interrupted pipeline starts over"
    parser.add_argument("--force", action="store_true", help=text)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ArgumentTypeError("must be 0 or more")
    return seconds


def add_hints(parser: "_ActionsContainer") -> None:
    """Add what checkpoints of others do not record; `hints` reads it."""
    text = "number of attention heads; needed unless the model has the width of a published size"
    parser.add_argument("--heads", type=int, help=text)
    text = "number of classes; needed if the label table has no null label, as without label dropout in training"
    parser.add_argument("--classes", type=int, help=text)
    text = "file with the mean and std of each latent channel; needed if the latents were normalised by them"
    parser.add_argument("--latent-statistics", metavar="FILE", help=text)
    text = "text file with the names of the classes, one a line in the order of the labels"
    parser.add_argument("--class-names", metavar="FILE", help=text)
    text = "side of the latents; needed if the file has no pos_embed"
    parser.add_argument("--latent-size", type=int, help=text)
    text = (
        "diffusion process, if the file does not name it; gaussian: predicts noise, as the published DiT; flow: as SiT "
        "and LightningDiT; reversed-flow: with time 1 at the noise, as REPA"
    )
    parser.add_argument("--process", choices=("gaussian", "flow", "reversed-flow"), help=text)


def hints(options: Namespace) -> "Hints":
    """What the user says about a checkpoint."""
    return {
        "heads": options.heads,
        "classes": options.classes,
        "class_names": options.class_names,
        "latent_statistics": options.latent_statistics,
        "latent_size": options.latent_size,
        "process": options.process,
    }


def check_root(root: str) -> None:
    """Check that outputs can be written to a root; create a local one.

    Raises:
        InputError: outputs cannot be written.
    """
    try:
        home = uri.local_path(uri.checked(root))
        if uri.redact(root) != root:
            raise InputError("the URL has a query; choose another name")
        if home is None:
            uri.exists(root)
            return
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.W_OK):
            raise InputError("cannot be written to")
    except Exception as error:  # each kind of store raises its own exceptions
        raise InputError(f"--root {uri.redact(root)}: {getattr(error, 'strerror', None) or error}") from error
