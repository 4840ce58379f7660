"""What a sampler yields, and the noise that it asks for."""

# B = batch, C = channels, H, W = height and width

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

StepNoise = Callable[[int], Tensor]
"""Standard normal numbers (B, C, H, W) for the step of that index (see `dit.samplers.noise.SampleNoise`)."""


class State(NamedTuple):
    """The samples after a step."""

    step: int
    """Index of the step just taken, counted down to 0."""
    x: Tensor
    """Samples after the step (B, C, H, W)."""
    x0: Tensor
    """Expected data according to the network, before the step (B, C, H, W)."""


def last(states: Iterable[State]) -> Tensor:
    """Run a sampler to its end and return the samples (B, C, H, W)."""
    *_, state = states
    return state.x
