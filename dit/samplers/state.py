"""What a sampler yields, and the noise that it asks for."""

# B = batch, C = channels, H, W = height and width

from collections import deque
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
    passes: Tensor | None = None
    """Passes of the network so far for each sample (B,), where they do not follow from the step."""


def end(states: Iterable[State]) -> State:
    """Run a sampler to its end, keeping no state but the last."""
    (state,) = deque(states, maxlen=1)
    return state


def last(states: Iterable[State]) -> Tensor:
    """Run a sampler to its end and return the samples (B, C, H, W)."""
    return end(states).x
