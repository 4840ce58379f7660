"""``ditflow models``: each model with its parameters, compute and memory."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flows.command.options import add_json

if TYPE_CHECKING:
    from dit.models.config import ModelConfig
    from dit.models.cost import Cost

HELP = "list every model with its parameters, compute and memory"
HEADER = ("model", "params M", "GMAC", "GFLOP/image", "weights", "gradients", "AdamW", "EMA GiB")
WIDTHS = (24, 9, 8, 12, 8, 10, 7, 8)
NOTE = """params M: with DiT's fixed position table and without DiffiT's, as the papers count them
SiT: as it is trained here, without the half of the outputs that the published files have and SiT does not use
LightningDiT: for the same images, with an autoencoder of 32 channels and half the side"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = "side of the latents, in latent pixels (default: 32, for images of 256 pixels)"
    parser.add_argument("--latent", type=int, default=32, metavar="SIDE", help=text)
    add_json(parser)


def run(options: Namespace) -> None:
    """Print the models."""
    for line in [as_json(options.latent)] if options.json else table(options.latent):
        print(line)


def table(latent: int) -> Iterator[str]:
    """One line for each model, as soon as it is counted, and notes on parameters and latents.

    Parameters are counted as in `as_json`; GFLOP are those of training, memory is in GiB of float32.

    Raises:
        InputError: the latent does not divide into the largest patches.
    """
    from dit.models.cost import catalogue, cost

    models = list(catalogue(latent))
    yield _line(HEADER)
    for name, config in models:
        yield _line((name, *_cells(config, cost(config))))
    yield NOTE


def as_json(latent: int) -> str:
    """A JSON object with the side of the latents and the models in the table's order.

    ``params_m`` are the million parameters that the model's paper counts, and ``params_counted`` says which:
    "all" for DiT, with the fixed position table; "trained" for DiffiT, without it.

    Raises:
        InputError: the latent does not divide into the largest patches.
    """
    from dit.models.cost import catalogue, cost

    rows = [{"model": name} | _row(config, cost(config)) for name, config in catalogue(latent)]
    return json.dumps({"latent": latent, "models": rows})


def _row(config: "ModelConfig", cost: "Cost") -> dict[str, Any]:
    counted, parameters = _published(config, cost)
    return {
        "config": config.model_dump(),
        "params_m": parameters / 1e6,
        "params_counted": counted,
        "gmac": cost.macs / 1e9,
        "training_flops": cost.training_flops,
        "memory_bytes": cost.memory,
    }


def _cells(config: "ModelConfig", cost: "Cost") -> list[str]:
    _, parameters = _published(config, cost)
    counts = (f"{parameters / 1e6:.2f}", f"{cost.macs / 1e9:.2f}", f"{cost.training_flops / 1e9:.1f}")
    return [*counts, *(f"{size / 2**30:.2f}" for size in cost.memory.values())]


def _published(config: "ModelConfig", cost: "Cost") -> tuple[str, int]:
    """Which parameters the model's paper counts, and their number."""
    return ("all", cost.parameters) if config.kind == "dit" else ("trained", cost.trained)


def _line(cells: tuple[str, ...]) -> str:
    first, *numbers = cells
    return first.ljust(WIDTHS[0]) + "".join(cell.rjust(width) for cell, width in zip(numbers, WIDTHS[1:], strict=True))
