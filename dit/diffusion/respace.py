"""Fewer steps from the same process (Nichol & Dhariwal, arXiv 2102.09672, section 4)."""

import torch
from torch import Tensor

from storage.errors import InputError


def kept_timesteps(total: int, spacing: int | str) -> list[int]:
    """Which of ``total`` timesteps to keep, in rising order.

    Args:
        total: timesteps of the full process.
        spacing: a number of steps such as 250 or "250", spread evenly over the whole range with a
            fractional stride, rounded; or "ddimN" for N steps from 0 at a whole stride.

    Raises:
        InputError: the spacing is not readable, or no such number of steps fits.
    """
    text = str(spacing)
    count = text.removeprefix("ddim")
    if not count.isdecimal() or not 2 <= int(count) <= total:
        raise InputError(f"steps {text!r}: write a number from 2 to {total}, or 'ddim' and a number")
    return _whole(total, int(count)) if text.startswith("ddim") else _spread(total, int(count))


def respaced_betas(alphas_cumprod: Tensor, kept: Tensor) -> Tensor:
    """Noise variances (n,) of the process that visits only the ``kept`` timesteps (n,) of ``alphas_cumprod``."""
    alphas = alphas_cumprod[kept]
    return 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])


def _spread(total: int, count: int) -> list[int]:
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _whole(total: int, count: int) -> list[int]:
    for stride in range(1, total):
        if len(range(0, total, stride)) == count:
            return list(range(0, total, stride))
    raise InputError(f"steps 'ddim{count}': no whole stride through {total} timesteps gives {count}; leave 'ddim' out")
