"""Samplers of flows on a fixed grid of times (SiT: Ma et al., arXiv 2401.08740).

The velocity v(x, t) that a network has learned takes noise, at t = 0, to data, at t = 1, by dx = v dt (equation 5).

    Euler    x' = x + h v
    Heun     x' = x + h (v + v') / 2, with v' at the end of Euler's step

have errors of order h and h^2. The last step ends at the expected data, which is Euler's step for the linear path.
Nothing is evaluated at sigma = 0, where noise and score do not follow from the velocity and VP's path is infinitely
steep.

Noise that is added on the way and taken out again leaves the distributions as they are, for any w(t) >= 0 (equation 6,
with w for half of the paper's w):

    dx = (v + w score) dt + sqrt(2 w) dW

A step of Euler and Maruyama adds the normal noise of variance 2 w h. The last one, of a size of its own, adds none.

The grid is even in t, and then shifted: t' = s t / (1 + (s - 1) t). Less than 1, s makes steps near the noise shorter.
"""

# B = batch, C = channels, H, W = height and width, t = time, from 0 at the noise to 1 at the data

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from dit.diffusion.flow import CUT, Flow
from dit.diffusion.process import Denoiser
from dit.samplers.state import State, StepNoise
from storage.errors import InputError

Coefficient = Literal["sigma", "linear", "constant", "sbdm"]
"""Names of w."""
COEFFICIENTS: dict[Coefficient, Callable[[Flow, Tensor], Tensor]] = {
    "sigma": lambda process, t: process.sigma(t),
    "linear": lambda _, t: 1 - t,
    "constant": lambda _, t: torch.ones_like(t),
    "sbdm": lambda process, t: (
        process.sigma(t) * (process.alpha_prime(t) / process.alpha(t) * process.sigma(t) - process.sigma_prime(t))
    ),
}
"""w by its name (SiT, table 2): sbdm is that of the diffusion with the path's distributions."""


def times(process: Flow, steps: int, *, shift: float = 1.0) -> Tensor:
    """Times (steps + 1,) in float64 from the first of the process's bounds to 1.

    Raises:
        InputError: the last step would begin where the network cannot be evaluated.
    """
    first, last = process.bounds
    grid = _shifted(first, 1.0, steps, shift)
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


@torch.no_grad()
def flow_heun(
    process: Flow, model: Denoiser, x: Tensor, y: Tensor | None, *, steps: int, shift: float = 1.0
) -> Iterator[State]:
    """Sample, yielding one state a step: two passes of the network, and one in the last. No noise is added.

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
        if step > 0:
            h = float(t_next - t)
            ahead = process.predict(model, x + h * now.velocity, _all(t_next, x), y)
            x = x + h / 2 * (now.velocity + ahead.velocity)
        else:
            x = now.x0
        yield State(step, x, now.x0)


@torch.no_grad()
def euler_maruyama(
    process: Flow,
    model: Denoiser,
    x: Tensor,
    y: Tensor | None,
    noise: StepNoise,
    *,
    steps: int,
    shift: float = 1.0,
    coefficient: Coefficient = "sigma",
    last_step: float = 0.04,
) -> Iterator[State]:
    """Sample with noise on the way, yielding one state a step, each one pass of the network.

    Args:
        process: the flow.
        model: the network, possibly guided.
        x: standard normal numbers (B, C, H, W); all states have their dtype.
        y: labels (B,), or None.
        noise: called once a step with its index, from ``steps - 1`` down to 1.
        steps: number of steps.
        shift: below 1, steps near the noise are shorter.
        coefficient: name of w. That of sbdm is infinite at t = 0, so it starts above.
        last_step: size of the last step, at least the distance of the last of the process's bounds from 1.
    """
    first = max(process.bounds[0], CUT) if coefficient == "sbdm" else process.bounds[0]
    grid = torch.cat([_shifted(first, 1 - last_step, steps - 1, shift), torch.ones(1, dtype=torch.float64)])
    for step in reversed(range(steps)):
        t, h = grid[-2 - step], float(grid[-1 - step] - grid[-2 - step])
        now = process.predict(model, x, _all(t, x), y)
        w = float(COEFFICIENTS[coefficient](process, t))
        x = x + h * (now.velocity + w * process.score(now.velocity, x, _all(t, x)))
        if step > 0:
            x = x + (2 * w * h) ** 0.5 * noise(step)
        yield State(step, x, now.x0)


def _shifted(first: float, last: float, steps: int, shift: float) -> Tensor:
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return first + (last - first) * shift * even / (1 + (shift - 1) * even)


def _all(t: Tensor, x: Tensor) -> Tensor:
    """A time for each sample, (B,)."""
    return t.to(x.device).expand(len(x))
