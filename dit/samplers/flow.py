"""Samplers of flows on a fixed grid of times (SiT: Ma et al., arXiv 2401.08740).

The velocity v(x, t) that a network has learned takes noise, at t = 0, to data, at t = 1, by dx = v dt (equation 5).

    Euler    x' = x + h v
    Heun     x' = x + h (v + v') / 2, with v' at the end of Euler's step

have errors of order h and h^2. The last step ends at the expected data, which is Euler's step for the linear path.
Nothing is evaluated at sigma = 0, where noise and score do not follow from the velocity and VP's path is infinitely
steep.

The grid is even in t, and then shifted: t' = s t / (1 + (s - 1) t). Less than 1, s makes steps near the noise shorter.
"""

# B = batch, C = channels, H, W = height and width, t = time, from 0 at the noise to 1 at the data

from collections.abc import Iterator

import torch
from torch import Tensor

from dit.diffusion.flow import Flow
from dit.diffusion.process import Denoiser
from dit.samplers.state import State
from storage.errors import InputError


def times(process: Flow, steps: int, *, shift: float = 1.0) -> Tensor:
    """Times (steps + 1,) in float64 from the first of the process's bounds to 1.

    Raises:
        InputError: the last step would begin where the network cannot be evaluated.
    """
    first, last = process.bounds
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    grid = first + (1 - first) * shift * even / (1 + (shift - 1) * even)
    if grid[-2] > last:
        reason = f"the last of {steps} begins at t = {float(grid[-2]):.5f}, but the network is evaluated up to {last:g}"
        raise InputError(f"sample.steps: {reason}; take fewer steps or a smaller sample.shift")
    return grid


@torch.no_grad()
def euler(
    process: Flow, model: Denoiser, x: Tensor, y: Tensor | None, *, steps: int, shift: float = 1.0
) -> Iterator[State]:
    """Sample, yielding one state a step, each one pass of the network. No noise is added.

    Args:
        process: the flow.
        model: the network, possibly guided.
        x: standard normal numbers (B, C, H, W); all states have their dtype.
        y: labels (B,), or None.
        steps: number of steps.
        shift: below 1, steps near the noise are shorter.

    Raises:
        InputError: as `times`.
    """
    grid = times(process, steps, shift=shift)
    for step in reversed(range(steps)):
        t, t_next = grid[-2 - step], grid[-1 - step]
        now = process.predict(model, x, _all(t, x), y)
        x = x + float(t_next - t) * now.velocity if step > 0 else now.x0
        yield State(step, x, now.x0)


def _all(t: Tensor, x: Tensor) -> Tensor:
    """A time for each sample, (B,)."""
    return t.to(x.device).expand(len(x))
