"""Sampling in fewer steps than a model was trained with (Nichol & Dhariwal, arXiv 2102.09672, section 4).

A network trained on T timesteps knows the noise at each. The marginals q(x_t | x_0) depend on abar_t alone (see
`dit.diffusion.gaussian`). So a process that visits only the timesteps S_0 < S_1 < ... keeps their abar, and its
noise variances follow from abar_{S_i} = (1 - beta_i) abar_{S_{i-1}}:

    beta_i = 1 - abar_{S_i} / abar_{S_{i-1}}    (abar before the first step is 1)

Everything else is derived from these betas as before. The network is still given the original timestep S_i.
"""

from itertools import accumulate, repeat

import torch
from torch import Tensor

from storage.errors import InputError


def kept_timesteps(total: int, spacing: int | str) -> list[int]:
    """Which of ``total`` timesteps to keep, in rising order.

    Args:
        total: timesteps of the full process.
        spacing: a number of steps such as 250 or "250", spread evenly over the whole range with a
            fractional stride, rounded; or "ddimN" for N steps from 0 at an integer stride.

    Raises:
        InputError: the spacing is no such text, or no stride gives this number of steps.

    Examples:
        >>> kept_timesteps(1000, 5)
        [0, 250, 500, 749, 999]
        >>> kept_timesteps(1000, "ddim5")
        [0, 200, 400, 600, 800]
    """
    text = str(spacing)
    count = text.removeprefix("ddim")
    if not count.isdecimal() or not 2 <= int(count) <= total:
        raise InputError(f"steps: {text!r} is neither a number from 2 to {total} nor 'ddim' and such a number")
    return _integer_stride(total, int(count)) if text.startswith("ddim") else _evenly_spaced(total, int(count))


def respaced_betas(alphas_cumprod: Tensor, kept: Tensor) -> Tensor:
    """Noise variances (n,) of the process that visits only the ``kept`` timesteps (n,) of ``alphas_cumprod``."""
    alphas = alphas_cumprod[kept]
    return 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])


def _evenly_spaced(total: int, count: int) -> list[int]:
    stride = (total - 1) / (count - 1)  # added up in floating point, as DiT does: it decides where halves are rounded
    return [round(position) for position in accumulate(repeat(stride, count - 1), initial=0.0)]


def _integer_stride(total: int, count: int) -> list[int]:
    for stride in range(1, total):
        if len(range(0, total, stride)) == count:
            return list(range(0, total, stride))
    raise InputError(f"steps: no integer stride through {total} timesteps gives 'ddim{count}'; write {count} instead")
