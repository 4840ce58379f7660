"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) and autoguidance (Karras et al., arXiv 2406.02507).

A network trained with some labels replaced by a null label knows both p(x | y) and p(x). Sampling with the scores of

    p(x) (p(x | y) / p(x))^s

for s > 1 favours images in which the class is easy to recognise: better samples, less variety. The noise that a
network predicts is the score times -sigma, so this reads

    noise = noise(null) + s (noise(y) - noise(null))        (equation 6, with s = 1 + w)

at the price of a second pass. The scale s may grow as the noise falls (`power_cosine`), and guidance may be limited
to an interval of times, outside of which the second pass is saved (Kynkäänniemi et al., arXiv 2404.07724).

Autoguidance replaces the pass with the null label by one of a worse model of the same process, the guide, with the same
labels: a smaller or less trained one, which makes the same errors, only larger. So the expected data are

    D = D_guide + s (D_model - D_guide)

Noise, velocity and the raw output of a preconditioned network are affine in D at a given x and t, with the same
coefficients for both models, so guiding them is the same.
"""

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
    """A guided network.

    The chosen channels of the prediction are guided. All other outputs, also the variance, are the network's own for
    the label. At scale 1 there is one pass of the network, and its output is unchanged.
    """

    model: Denoiser
    scale: float
    null_label: int
    """The label of no class: the model's ``num_classes``. Not used with a guide."""
    channels: Channels = "first3"
    """Channels of the prediction to guide. The published DiT results guide three of four."""
    schedule: Schedule = "constant"
    """A constant scale, or one that grows towards the data (see `power_cosine`)."""
    interval: tuple[float, float] | None = None
    """Lowest and highest time to guide, both included, as the network is given times; None guides at all times."""
    flow: bool = False
    """Whether times go from 0 at the noise to 1 at the data. Else they are timesteps, if the schedule asks."""
    guide: Denoiser | None = None
    """The worse model of autoguidance; None guides with the network's own prediction for the null label."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, /) -> Tensor:
        """A prediction from noisy data (B, C, H, W), times (B,) and labels (B,).

        Without a guide the network gets one batch of at most 2B rows. The guide gets a batch of its own, and none if
        no row is to be guided.

        Raises:
            InputError: there are no labels to guide towards, and no guide.
        """
        if self.scale == UNGUIDED:
            return self.model(x, t, y)
        rows = self._rows(t)
        good, bad = self._of_null_label(x, t, y, rows) if self.guide is None else self._of_guide(x, t, y, rows)
        count = x.shape[1] if self.channels == "all" else 3
        guided = bad[:, :count] + self._scale(t[rows], x) * (good[rows, :count] - bad[:, :count])
        out = good.clone()
        out[rows, :count] = guided
        return out

    def _of_null_label(self, x: Tensor, t: Tensor, y: Tensor | None, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The network's predictions for the labels, and for the null label of the rows to guide."""
        if y is None:
            raise InputError(f"guidance_scale: {self.scale:g} needs labels; set it to 1 for an unconditional model")
        labels = torch.cat([y, torch.full_like(y[rows], self.null_label)])
        both = self.model(torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), labels)
        return both[: len(x)], both[len(x) :]

    def _of_guide(self, x: Tensor, t: Tensor, y: Tensor | None, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The network's predictions, and the guide's of the rows to guide."""
        assert self.guide is not None
        good = self.model(x, t, y)
        if len(t[rows]) == 0:
            return good, good[rows]
        return good, self.guide(x[rows], t[rows], None if y is None else y[rows])

    def _rows(self, t: Tensor) -> Tensor | slice:
        """Rows of the batch to guide."""
        if self.interval is None:
            return slice(None)
        lowest, highest = self.interval
        return ((t >= lowest) & (t <= highest)).nonzero()[:, 0]

    def _scale(self, t: Tensor, like: Tensor) -> Tensor | float:
        if self.schedule == "constant":
            return self.scale
        timesteps = 1000 * (1 - t.double()) if self.flow else t
        return power_cosine(self.scale, timesteps).to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def power_cosine(scale: float, t: Tensor, *, steps: int = 1000, power: float = 4.0) -> Tensor:
    """Scales (B,) in float64, from 1 at pure noise to ``scale`` at the data (Gao et al., arXiv 2303.14389).

    1 + (scale - 1) (1 - cos(pi (1 - t / steps)^power)) / 2. Latent DiffiT is sampled so at 256 px.

    Args:
        scale: the scale at t = 0.
        t: timesteps (B,) of the full process.
        steps: timesteps of the full process.
        power: larger values let the scale grow later.
    """
    remaining = 1 - t.double() / steps
    return 1 + (scale - 1) * (1 - torch.cos(math.pi * remaining**power)) / 2
