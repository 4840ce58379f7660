"""Networks of flows, brought into the time and the output that `dit.diffusion.flow` expects of them.

Time. Some flows, such as REPA's, have noise at t = 1. With t' = 1 - t the same path is ours, and its velocity changes
its sign. The network sees t as cosines and sines of f t, for fixed frequencies f, and by the addition theorems

    cos(f (1 - t)) = cos f cos(f t) + sin f sin(f t)
    sin(f (1 - t)) = sin f cos(f t) - cos f sin(f t)

So it is a linear map of them, which the first Linear of the time embedding takes in. The network of the weights that
come out is that of the file at 1 - t, up to rounding. A change of sign goes into the last Linear.

Output. SiT has the 2C channels of a DiT and uses the first C. The others are left out.
"""

# C = latent channels, p = patch size, D = width

from typing import Final

import torch
from torch import Tensor

from dit.convert.layout import AnyConfig
from dit.diffusion.config import FlowConfig
from dit.models.layers import timestep_sinusoid

TIME: Final = "t_embedder.mlp.0.weight"
HEAD: Final = ("final_layer.linear.weight", "final_layer.linear.bias")


def reversed_time(state: dict[str, Tensor], flow: FlowConfig) -> dict[str, Tensor]:
    """The weights of a network whose time runs the other way round.

    Args:
        state: the weights by our names, float32.
        flow: what it predicts; a velocity changes its sign.
    """
    cos, sin = timestep_sinusoid(torch.ones(1)).double().chunk(2, dim=1)  # of the frequencies: (1, 128) each
    of_cos, of_sin = state[TIME].double().chunk(2, dim=1)
    changed = {TIME: torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1).float()}
    if flow.predict == "velocity":
        changed |= {name: -state[name] for name in HEAD}
    return state | changed


def without_variance(config: AnyConfig, state: dict[str, Tensor]) -> tuple[AnyConfig, dict[str, Tensor]]:
    """Config and weights without the second half of the output's channels."""
    pixels, channels = config.patch_size**2, config.in_channels
    cut = {name: state[name].unflatten(0, (pixels, 2 * channels))[:, :channels].flatten(0, 1) for name in HEAD}
    return config.model_copy(update={"learn_variance": False}), state | cut
