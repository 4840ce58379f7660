"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685, section 4.1): a Linear layer's weight W becomes

    W + alpha / r B A

with A (r, in) and B (out, r). Only A and B are trained. B starts at zero, so the model starts as it was. Once trained,
the sum is a plain weight again, and nobody needs to know of adapters.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dit.models.layers import zero
from storage.config import Config

A, B = "lora_a", "lora_b"


class Lora(Config):
    """Low-rank adapters of Linear layers (LoRA, Hu et al., arXiv 2106.09685)."""

    rank: int = Field(default=8, ge=1)
    """Rank r of the change of a layer's weight: a layer from m to n numbers gets r (m + n) trained ones."""
    alpha: float = Field(default=8.0, gt=0)
    """The change counts alpha / rank times, so another rank needs no other learning rate."""
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=("*blocks.*",), min_length=1)
    """Linear layers that get adapters, by patterns of their names such as ``*.attn.*``, as for ``freeze``; by default
    those of all blocks."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


class Adapted(nn.Module):
    """A Linear layer with an adapter. Its own weight and bias keep their names."""

    def __init__(self, layer: nn.Linear, lora: Lora) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = layer.weight, layer.bias, lora.scale
        self.lora_a = nn.Parameter(layer.weight.new_empty(lora.rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_empty(layer.out_features, lora.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as torch's own Linear layers
        zero(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scale * change


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linear layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def adapt(model: nn.Module, names: Iterable[str], lora: Lora) -> None:
    """Give the named Linear layers adapters, in place. A is drawn from torch's generator."""
    for name in names:
        outer, _, last = name.rpartition(".")
        parent, layer = model.get_submodule(outer), model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(parent, last, Adapted(layer, lora))


def merged(tensors: Mapping[str, Tensor], lora: Lora | None) -> dict[str, Tensor]:
    """The weights of the plain model that computes the same; each sum is rounded once.

    Args:
        tensors: weights by name, whole and in the host's memory; not changed.
        lora: how its adapters were made; None for a model without.
    """
    plain = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in (A, B)}
    for name in tensors:
        layer, _, last = name.rpartition(".")
        if lora and last == A:
            weight, a, b = (tensors[f"{layer}.{part}"].double() for part in ("weight", A, B))
            plain[f"{layer}.weight"] = torch.addmm(weight, b, a, alpha=lora.scale).float()
    return plain
