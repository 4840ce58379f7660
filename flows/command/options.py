"""Arguments that several commands share. Imports nothing heavy, so that help comes at once."""

import math
import os
import re
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from flows import recipe_file, recipe_schema
from flows.contract import Stage
from flows.inventory import IN_MLFLOW, input_of
from storage import uri
from storage.errors import InputError
from storage.manifest import Manifest
from storage.patience import STAGE_SECONDS

if TYPE_CHECKING:
    from argparse import _ActionsContainer

    from dit.convert import Hints

RECIPE = "name of a preset, or path of a YAML file"
NOT_DONE = "the stages before it are not done; run the recipe first, or give --from"


def complete(argument: Action, names: Callable[..., list[str]]) -> None:
    """Let the shell complete an argument by names, which a function returns for what is typed of one."""
    argument.completer = names  # type: ignore[attr-defined]  # which argcomplete reads


def preset_names(prefix: str = "", **_: object) -> list[str]:
    """The presets, and the YAML files that begin with what is typed."""
    from argcomplete.completers import FilesCompleter

    return [*recipe_file.presets(), *FilesCompleter(("yaml", "yml"))(prefix)]


def _overrides(prefix: str, **_: object) -> list[str]:
    key, equals, _value = prefix.partition("=")
    if equals:
        return [f"{key}={value}" for value in recipe_schema.values_of(key.split("."))]
    return [f"{key}=" for key in recipe_schema.all_keys()]


def add_recipe(parser: ArgumentParser, *, optional: bool = False) -> None:
    """Add the recipe."""
    complete(parser.add_argument("recipe", nargs="?" if optional else None, help=RECIPE), preset_names)


def add_root(parser: ArgumentParser) -> None:
    """Add ``--root``; `check_root` checks its value."""
    default = os.environ.get("DITFLOW_ROOT", "runs")
    parser.add_argument("--root", default=default, help="folder or URL of all outputs (default: %(default)s)")


def add_output(parser: ArgumentParser, name: str) -> None:
    """Add an output of the root."""
    text = (
        "digits of its digest; a recipe or latest, or recipe/stage, for its newest; its folder; an MLflow run; "
        "models:/name@alias"
    )
    parser.add_argument(name, help=text)


def add_set(parser: ArgumentParser, text: str = "change one value of the recipe, such as train.steps=2000") -> None:
    """Add ``--set``, which may be given several times."""
    text = f"{text}; repeatable"
    complete(parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text), _overrides)


def add_json(parser: ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else, one object a line")


def add_running(parser: ArgumentParser) -> None:
    """Add the options of all commands that run stages."""
    add_root(parser)
    add_set(parser)
    add_json(parser)
    text = "seconds for which a stage asks an object store again that does not answer (default: %(default)s)"
    parser.add_argument("--patience", type=at_least_zero, default=STAGE_SECONDS, metavar="SECONDS", help=text)
    text = "also print what Prefect and the ranks log"
    parser.add_argument("-v", "--verbose", action="store_true", help=text)
    text = "run finished stages again, into new folders; an interrupted pipeline starts over"
    parser.add_argument("--force", action="store_true", help=text)


def at_least_one(text: str) -> int:
    """A number from 1 on, as an argument."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"{text}: must be a whole number of 1 or more")
    return number


def at_least_zero(text: str) -> float:
    """A number from 0 on, as an argument."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"{text}: must be a number of at least 0")
    return number


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


def check_names(options: Namespace) -> None:
    """Check the recipes that are named, and the keys of ``--set``, before anything heavy is imported.

    Raises:
        InputError: there is no such recipe or key; the line offers the nearest one.
    """
    named = getattr(options, "recipe", None) or []
    recipe_file.check_names([named] if isinstance(named, str) else named, getattr(options, "set", []), options.root)


def check_done(what: str, stage: str, root: str, text: str) -> None:
    """Check that a root has any output of a stage, finished or not, before anything heavy is imported.

    Raises:
        InputError: it has none; the line begins with ``what`` and says ``text``.
    """
    if not uri.names(uri.join(root, stage)):
        raise InputError(f"{what}: {text}")


def check_source(stage: Stage, given: str, root: str) -> str:
    """The manifest or folder that a person names as a stage's input, found before anything heavy is imported.

    What MLflow knows is returned as it is.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if re.fullmatch(IN_MLFLOW, given):
        return given
    found = input_of(stage, given, root)
    Manifest.read(found)
    return found


def check_root(root: str, *, reading: bool = False) -> None:
    """Check that outputs can be written to a root, and create a local one; or only that there is one.

    Raises:
        InputError: outputs cannot be written, or there is no such root.
    """
    try:
        home = uri.local_path(uri.checked(root))
        if uri.redact(root) != root:
            raise InputError("the URL has a query; choose another name")
        if home is None:
            uri.exists(root)
            return
        if reading:
            if not home.is_dir():
                raise InputError("no such folder")
            return
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.W_OK):
            raise InputError("cannot be written to")
    except Exception as error:  # each kind of store raises its own exceptions
        raise InputError(f"--root {uri.redact(root)}: {getattr(error, 'strerror', None) or error}") from error
