"""Exponential moving average of a model's parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from storage.errors import InputError


class EMA:
    """average = decay * average + (1 - decay) * parameter, in float32, from the given parameters on.

    Names are those of `named_parameters`, so give the plain model rather than a compiled or
    distributed wrapper of it; tensors sharded in place (FSDP2) stay sharded.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start at the model's parameters.

        Raises:
            InputError: the decay is not in 0 .. 1.
        """
        if not 0 <= decay <= 1:
            raise InputError(f"ema_decay {decay}: must lie between 0 and 1")
        self.decay = decay
        self._averages = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's parameters after a step."""
        parameters = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_(list(self._averages.values()), parameters, 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into a model of the same shape."""
        torch._foreach_copy_(list(model.parameters()), list(self._averages.values()))

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
