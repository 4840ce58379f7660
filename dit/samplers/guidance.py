"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

# B = batch, C = channels, H, W = height and width

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit.diffusion.process import Denoiser
from storage.errors import InputError

Channels = Literal["first3", "all"]
Schedule = Literal["constant", "power_cosine"]
UNGUIDED = 1.0
"""The scale at which there is no guidance."""


@dataclass(frozen=True)
class Guided:
    """A network whose noise is pushed from the null label's prediction towards the label's.

    noise = null + scale * (label - null) on the chosen channels of the noise. Whatever else the
    network returns, the other channels and the variance, is the label's prediction. At scale 1
    the network itself answers, alone and unchanged.
    """

    model: Denoiser
    scale: float
    null_label: int
    """The label that means none: the model's ``num_classes``."""
    channels: Channels = "first3"
    """Channels of the noise to guide. The published DiT results guide three of four."""
    schedule: Schedule = "constant"
    """The same scale at every time, or one that grows towards the data (see `power_cosine`)."""
    interval: tuple[float, float] | None = None
    """Times, in the network's own measure and both included, outside of which the network answers
    alone, with no second pass (Kynkäänniemi et al., arXiv 2404.07724); None guides at all times."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, /) -> Tensor:
        """Noisy data (B, C, H, W), times (B,) and labels (B,) to a prediction, in one batch of 2B at most.

        Raises:
            InputError: there are no labels to guide towards.
        """
        if self.scale == UNGUIDED:
            return self.model(x, t, y)
        if y is None:
            raise InputError(f"guidance scale {self.scale:g} needs labels; set it to 1 for an unconditional model")
        rows = self._rows(t)
        labels = torch.cat([y, torch.full_like(y[rows], self.null_label)])
        both = self.model(torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), labels)
        label, null = both[: len(x)], both[len(x) :]
        count = x.shape[1] if self.channels == "all" else 3
        guided = null[:, :count] + self._scale(t[rows], x) * (label[rows, :count] - null[:, :count])
        out = label.clone()
        out[rows, :count] = guided
        return out

    def _rows(self, t: Tensor) -> Tensor | slice:
        """Which of the batch to guide."""
        if self.interval is None:
            return slice(None)
        lowest, highest = self.interval
        return ((t >= lowest) & (t <= highest)).nonzero()[:, 0]

    def _scale(self, t: Tensor, like: Tensor) -> Tensor | float:
        if self.schedule == "constant":
            return self.scale
        return power_cosine(self.scale, t).to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def power_cosine(scale: float, t: Tensor, *, steps: int = 1000, power: float = 4.0) -> Tensor:
    """Scales (B,) in float64 from 1 at pure noise to ``scale`` at the data (Gao et al., arXiv 2303.14389).

    1 + (scale - 1) (1 - cos(pi (1 - t / steps)^power)) / 2, as latent DiffiT is sampled.

    Args:
        scale: the scale at t = 0.
        t: timesteps (B,) of the full process.
        steps: timesteps of the full process.
        power: how late the scale grows.
    """
    remaining = 1 - t.double() / steps
    return 1 + (scale - 1) * (1 - torch.cos(math.pi * remaining**power)) / 2
