"""The method of Dormand and Prince for flows, of order 5, whose steps are as long as a tolerance allows.

Of the six slopes of a step, and a seventh at its end, which is the first of the next step, two sums make steps of order
5 and 4. Their difference estimates the error of a step, here as a root mean square over the numbers of one sample:

    ratio = rms(error / (atol + rtol max(|x|, |x'|)))

A step with a ratio above 1 is taken again. The next one is longer by the factor 0.9 / ratio^(1/5), which is kept
between 0.2 and 10, and above 1 after a step that is not taken again (Hairer, Norsett & Wanner, Solving Ordinary
Differential Equations I, 2nd edition, sections II.4 and II.5). The sum of order 4 and all constants are torchdiffeq's.

Every sample has its own steps, so it does not depend on the others of its batch.
"""

# B = batch, C = channels, H, W = height and width, t = time, from 0 at the noise to 1 at the data

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dit.diffusion.flow import Flow, FlowPrediction
from dit.diffusion.process import Denoiser, per_sample
from dit.samplers.state import State
from storage.errors import InputError

STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Weights of the slopes before each further slope. The last ones are those of the step, and each sums to its time."""
FOURTH = (1951 / 21600, 0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
"""Weights of the slopes in the step of order 4 (Shampine, Mathematics of Computation 46, 1986)."""
ERROR = tuple(fifth - fourth for fifth, fourth in zip((*STAGES[-1], 0), FOURTH, strict=True))
TYPICAL = 60
"""Passes of the network for a sample: the guess that a plan counts with.

Flows of photographs took 122 to 142 passes with tolerances of 1e-5 (Lipman et al., arXiv 2210.02747, table 1). With
1e-3 a method of order 5 has steps 100^(1/5) = 2.5 times as long. The demo's digits take 36.
"""
MOST = 5_000
"""Passes of the network after which a sample is given up."""

Predict = Callable[[Tensor, Tensor], FlowPrediction]


@torch.no_grad()
def dopri5(
    process: Flow, model: Denoiser, x: Tensor, y: Tensor | None, *, rtol: float = 1e-3, atol: float = 1e-6
) -> Iterator[State]:
    """Sample, yielding the last state alone, with the passes of the network for each sample. No noise is added.

    The whole batch goes through the network until its last sample is done. Samples that do not stay finite are NaN.

    Args:
        process: the flow.
        model: the network, possibly guided.
        x: standard normal numbers (B, C, H, W); the state has their dtype.
        y: labels (B,), or None.
        rtol: tolerated error of a step, as a share of the sample's numbers.
        atol: tolerated error of a step, added to that.

    Raises:
        InputError: a sample needs more than `MOST` passes, since the network's rounding errors are above the tolerance.
    """

    def predict(x: Tensor, t: Tensor) -> FlowPrediction:
        return process.predict(model, x, t, y)

    first, last = process.bounds
    t = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
    now = predict(x, t)
    slope, x0, expected = now.velocity, now.x0, now.x0
    h = _first_step(predict, x, slope, t, last - first, rtol, atol)
    passes = torch.full_like(t, 2, dtype=torch.int64)
    while (running := t < last).any():
        if passes.max() > MOST:
            reason = f"dopri5 has taken {MOST:,} passes up to time {t.min():.3g} of {last:g}"
            raise InputError(f"sample.rtol: {reason}; raise sample.rtol or atol, or set sample.precision=float32")
        end = t + h >= last
        h = torch.where(end, last - t, h)
        slopes = [slope]
        for weights in STAGES:
            ahead = x + _sum(weights, slopes, h)
            now = predict(ahead, t + sum(weights) * h)
            slopes.append(now.velocity)
        ratio = _rms(_sum(ERROR, slopes, h) / (atol + rtol * torch.maximum(x.abs(), ahead.abs())))
        passes += 6 * running
        taken, lost = running & (ratio <= 1), running & ~ratio.isfinite()
        x, slope, x0 = (
            torch.where(_column(taken, x), new, old) for new, old in ((ahead, x), (slopes[-1], slope), (now.x0, x0))
        )
        x0 = torch.where(_column(lost, x), torch.nan, x0)
        t = torch.where(taken & end | lost, last, torch.where(taken, t + h, t))
        h = h * (0.9 / ratio**0.2).clamp(torch.where(ratio < 1, 1.0, 0.2), torch.full_like(ratio, 10.0))
    yield State(0, x0, expected, passes)


def _first_step(predict: Predict, x: Tensor, slope: Tensor, t: Tensor, most: float, rtol: float, atol: float) -> Tensor:
    """Sizes (B,) of the first steps, from the first and second derivative (Hairer et al., section II.4).

    The second derivative is measured over at most ``most``, so within the times of the process.
    """
    scale = atol + rtol * x.abs()
    d0, d1 = _rms(x / scale), _rms(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=most)
    ahead = predict(x + per_sample(h0, x) * slope, t + h0).velocity
    d2 = _rms((ahead - slope) / scale) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(100 * h0, h1)


def _sum(weights: Sequence[float], slopes: Sequence[Tensor], h: Tensor) -> Tensor:
    total = sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)
    assert isinstance(total, Tensor)
    return per_sample(h, total) * total


def _rms(x: Tensor) -> Tensor:
    """Root mean squares (B,) in float64."""
    return x.double().square().flatten(1).mean(1).sqrt()


def _column(chosen: Tensor, like: Tensor) -> Tensor:
    return chosen.reshape(-1, *[1] * (like.ndim - 1))
