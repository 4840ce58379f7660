"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

# B = batch, C = channels, H, W = height and width

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit.diffusion.process import Denoiser
from storage.errors import InputError

Channels = Literal["first3", "all"]


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

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, /) -> Tensor:
        """Noisy data (B, C, H, W), timesteps (B,) and labels (B,) to a prediction, in one batch of 2B.

        Raises:
            InputError: there are no labels to guide towards.
        """
        if self.scale == 1:
            return self.model(x, t, y)
        if y is None:
            raise InputError(f"guidance scale {self.scale:g} needs labels; set it to 1 for an unconditional model")
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        label, null = self.model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        count = x.shape[1] if self.channels == "all" else 3
        guided = null[:, :count] + self.scale * (label[:, :count] - null[:, :count])
        return torch.cat([guided, label[:, count:]], dim=1)
