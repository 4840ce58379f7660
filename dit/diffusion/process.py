"""The interface of a diffusion process, as training sees it."""

# B = batch, C = channels, H, W = height and width

from typing import Protocol

from torch import Tensor


class Denoiser(Protocol):
    """A network, or a wrapper of one, as a process and a sampler see it."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, /) -> Tensor:
        """A prediction from noisy data (B, C, H, W), the network's time (B,) and labels (B,)."""


class Process(Protocol):
    """A way to turn data into noise, and a loss for learning the reverse.

    The times that `sample_t` returns and `training_terms` takes are the process's own (an index, a
    noise level); the process itself translates them into the time that the network is given.
    """

    def sample_t(self, u: Tensor) -> Tensor:
        """Times (B,) of a training batch from uniform numbers (B,) in [0, 1)."""

    def training_terms(
        self, model: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None
    ) -> dict[str, Tensor]:
        """The loss of each sample, (B,), under "loss", and its parts under their names.

        Args:
            model: the network.
            x0: data (B, C, H, W).
            noise: standard normal numbers (B, C, H, W).
            t: times (B,) from `sample_t`.
            y: labels (B,), with the dropped ones replaced by the null label; None if unconditional.
        """


def per_sample(factor: Tensor, like: Tensor) -> Tensor:
    """Factors (B,) as (B, 1, 1, 1), on the device and in the dtype of ``like``."""
    return factor.to(like).reshape(-1, *[1] * (like.ndim - 1))
