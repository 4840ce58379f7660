"""Exponential moving average of a model's parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dit.training.parallelize import local
from storage.errors import InputError


class EMA:
    """average = decay * average + (1 - decay) * parameter, in float32, from the given parameters on.

    With a ramp the half-life is at most that share of the steps taken, so that the average soon
    forgets where it began (Karras et al., arXiv 2206.00364, appendix F.2).

    Names are those of `named_parameters`, so give the plain model rather than a compiled or
    distributed wrapper of it; tensors sharded in place (FSDP2) stay sharded.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: float | None = None) -> None:
        """Start at the model's parameters.

        Raises:
            InputError: the decay is not in 0 .. 1.
        """
        if not 0 <= decay <= 1:
            raise InputError(f"ema_decay {decay}: must lie between 0 and 1")
        self.decay, self.ramp = decay, ramp
        self._averages = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, good: Tensor | bool = True) -> None:
        """Take in the model's parameters after a step, before which ``step`` steps had been taken.

        Args:
            good: whether to, a scalar that may still be on its way on the device.
        """
        averages = [local(average) for average in self._averages.values()]
        parameters = [local(p.detach()).float() for p in model.parameters()]
        weight = torch.full((), 1 - self.decay_at(step), device=parameters[0].device) * good
        torch._foreach_lerp_(averages, parameters, [weight] * len(parameters))

    def decay_at(self, step: int) -> float:
        """The decay after a step, before which ``step`` steps had been taken."""
        if self.ramp is None:
            return self.decay
        return min(self.decay, 0.5 ** (1 / (self.ramp * step))) if step else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, which a model of that shape loads. Not copies."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved averages.

        Raises:
            InputError: a name is missing, unknown, or has another shape; the line names it.
        """
        for name in sorted(self._averages.keys() ^ state.keys()):
            raise InputError(f"moving average: {name} is {'missing' if name in self._averages else 'unknown'}")
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                found, needed = tuple(state[name].shape), tuple(average.shape)
                raise InputError(f"moving average: {name} has shape {found} instead of {needed}")
            average.copy_(state[name])
