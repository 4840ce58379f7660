"""The scale on which a model sees latents: that of the autoencoder, or each channel with mean 0 and deviation 1."""

# B = batch, C = latent channels, h = latent side

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dit.devices import sent
from storage import uri
from storage.channels import ChannelScale, combined
from storage.errors import InputError
from storage.latents import LatentManifest, VaeInfo

Normalise = Literal["scale", "channel"]
ENCODE_AGAIN: Final = "encode them again with --force, or set train.normalise=scale"


@dataclass(frozen=True)
class LatentScale:
    """A model's data are (z - shift) * factor, of latents z."""

    shift: float | NDArray[np.float32]
    """A number, or one for each channel, (C, 1, 1)."""
    factor: float | NDArray[np.float32]
    """As ``shift``."""

    @classmethod
    def of(cls, vae: VaeInfo, channels: ChannelScale | None) -> "LatentScale":
        """That of the channels if there is one, and else the autoencoder's."""
        if channels is None:
            return cls(vae.shift_factor, vae.scaling_factor)
        shift, deviation = (np.array(numbers)[:, None, None] for numbers in (channels.mean, channels.deviation))
        return cls(shift.astype(np.float32), (1 / deviation).astype(np.float32))

    def scaled(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, h) as the model's data."""
        return (z - _on(self.shift, z)) * _on(self.factor, z)

    def unscaled(self, x: Tensor) -> Tensor:
        """The latents of a model's data (B, C, h, h)."""
        return x / _on(self.factor, x) + _on(self.shift, x)


def channel_scale(normalise: Normalise, latents: LatentManifest, *, flips: bool) -> ChannelScale | None:
    """The statistics that training normalises latents by; None for the scale of the autoencoder.

    Args:
        normalise: ``train.normalise``.
        latents: the images to train on.
        flips: whether their mirror images are trained on, too, each as often as the image.

    Raises:
        InputError: there are no such statistics, or a channel has one number only.
    """
    if normalise == "scale":
        return None
    if latents.vae is None:
        raise InputError("train.normalise: channel is for latents, and the data are pixels; set it to scale")
    where = uri.redact(latents.uri)
    if latents.statistics is None:
        text = "has no statistics of its channels, since an earlier version encoded some of it"
        raise InputError(f"train.normalise: {where} {text}; {ENCODE_AGAIN}")
    scale = combined(latents.statistics[: 2 if flips else 1])
    if 0.0 in scale.deviation:
        constant = f"channel {scale.deviation.index(0.0)} of {where} is the same number everywhere"
        raise InputError(f"train.normalise: {constant} and has no scale; set train.normalise=scale")
    return scale


def _on(numbers: float | NDArray[np.float32], values: Tensor) -> float | Tensor:
    """A scale where the values are."""
    return numbers if isinstance(numbers, float) else sent(numbers, values.device)
