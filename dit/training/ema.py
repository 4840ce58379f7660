"""Exponential moving average (EMA) of a model's weights, from which samples are drawn.

After step k = 0, 1, ... the average m of the weights w is

    m_k = d_k m_{k-1} + (1 - d_k) w_k

With a constant decay d the weights of j steps ago count (1 - d) d^j, and the initial ones d^(k+1). The half-life,
after which weights count half, solves d^h = 1/2: h = ln(1/2) / ln d, or 6,931 steps for d = 0.9999. A long
half-life also remembers the random initial weights for long. EDM's ramp r (Karras et al., arXiv 2206.00364,
appendix F.2) therefore bounds the half-life by a share of the k steps taken before:

    d_k = min(d, 0.5^(1 / (r k)))    for k > 0, and d_0 = 0

Other decays are a function of the step, such as those of `dit.training.power`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from dit.training.parallelize import local
from storage.errors import InputError

Decay = Callable[[int], float]
"""The decay d_k of step k, counted from 0."""


class EMA:
    """The average of a model's weights in float32, which starts at the weights it is given.

    Only parameters that are trained are averaged; the others are their own averages, and take no memory here.
    Names are those of `named_parameters`, so pass the plain model, not a compiled or distributed wrapper
    of it. Tensors sharded in place (FSDP2) stay sharded.

    Args:
        model: whose weights to average.
        decay: d above, in 0 .. 1; or the function that gives the decay d_k of step k, counted from 0.
        ramp: r above, of a constant decay; None does not bound the half-life.

    Raises:
        InputError: the decay is not in 0 .. 1.
    """

    def __init__(self, model: nn.Module, decay: float | Decay, ramp: float | None = None) -> None:
        if not callable(decay) and not 0 <= decay <= 1:
            raise InputError(f"train.ema_decay: {decay} is not between 0 and 1")
        self.decay_at: Decay = decay if callable(decay) else partial(_ramped, decay, ramp)
        self._averages = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, enabled: Tensor | bool = True) -> None:
        """Add the model's weights to the average after a step.

        Args:
            model: the model given at the start.
            step: number of the step, from 0.
            enabled: False leaves the average as it is; a scalar on the device is not waited for.
        """
        averages = [local(average) for average in self._averages.values()]
        parameters = [local(p.detach()).float() for p in _trained(model)]
        weight = torch.full((), 1 - self.decay_at(step), device=parameters[0].device) * enabled
        torch._foreach_lerp_(averages, parameters, [weight] * len(parameters))

    @contextmanager
    def exchanged(self, model: nn.Module) -> Iterator[None]:
        """For the length of the block the model has the average, and this holds its weights. No bit changes.

        Args:
            model: the model given at the start, whose parameters are float32.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for held, parameter in zip(self._averages.values(), _trained(model), strict=True):
            average, weights = local(held), local(parameter.detach())
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    def weights(self) -> dict[str, Tensor]:
        """The weights by parameter name, as a model loads them: averages, and what is not trained. Not copies."""
        return self._fixed | self._averages

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name. They are not copies."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the averages by saved ones.

        Raises:
            InputError: a name is missing, unknown, or has another shape; the line names it.
        """
        for name in sorted(self._averages.keys() ^ state.keys()):
            problem = "missing" if name in self._averages else "unknown"
            raise InputError(f"moving average: tensor {name} is {problem} in the saved state")
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                saved, expected = tuple(state[name].shape), tuple(average.shape)
                raise InputError(f"moving average: tensor {name} has shape {saved}, not {expected}")
            average.copy_(state[name])


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _ramped(decay: float, ramp: float | None, step: int) -> float:
    if ramp is None:
        return decay
    return min(decay, 0.5 ** (1 / (ramp * step))) if step else 0.0
