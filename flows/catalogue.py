"""The models that there are and what each costs, for people and for programs."""

import json
from collections.abc import Iterator
from typing import Any

from dit.models.cost import Cost, catalogue, cost

HEADER = ("model", "params M", "GMAC", "GFLOP/image", "weights", "gradients", "AdamW", "EMA GiB")
WIDTHS = (24, 9, 8, 12, 8, 10, 7, 8)


def table(latent: int) -> Iterator[str]:
    """One line a model, each as soon as it is counted; GFLOP are those of training, memory is in GiB of float32.

    Raises:
        InputError: the latent does not divide into the largest patches.
    """
    models = list(catalogue(latent))
    yield _line(HEADER)
    for name, config in models:
        yield _line((name, *_cells(cost(config))))


def as_json(latent: int) -> str:
    """One object: the side of the latent, and the models in the table's order.

    Raises:
        InputError: the latent does not divide into the largest patches.
    """
    rows = [{"model": name, "config": config.model_dump()} | _row(cost(config)) for name, config in catalogue(latent)]
    return json.dumps({"latent": latent, "models": rows})


def _row(found: Cost) -> dict[str, Any]:
    return {
        "params_m": found.parameters / 1e6,
        "gmac": found.macs / 1e9,
        "training_flops": found.training_flops,
        "memory_bytes": found.memory,
    }


def _cells(found: Cost) -> list[str]:
    counts = (f"{found.parameters / 1e6:.2f}", f"{found.macs / 1e9:.2f}", f"{found.training_flops / 1e9:.1f}")
    return [*counts, *(f"{size / 2**30:.2f}" for size in found.memory.values())]


def _line(cells: tuple[str, ...]) -> str:
    first, *numbers = cells
    return first.ljust(WIDTHS[0]) + "".join(cell.rjust(width) for cell, width in zip(numbers, WIDTHS[1:], strict=True))
