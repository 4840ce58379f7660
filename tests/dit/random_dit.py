"""Small DiTs whose every weight counts: none is zero, as it would be before training."""

from typing import Any

import torch
from torch import nn

from dit.convert import Pretrained
from dit.diffusion.config import DiffusionConfig
from dit.models.config import DiffiTConfig, DiTConfig
from dit.models.diffit_latent import LatentDiffiT
from dit.models.dit import DiT

SMALL: dict[str, Any] = {"input_size": 16, "width": 64, "depth": 3, "heads": 4, "num_classes": 10}


def random_dit(**fields: Any) -> DiT:
    model = DiT(DiTConfig(**SMALL | fields)).eval()
    randomise(model, std=0.05, seed=0)
    return model.requires_grad_(False)


def random_diffit(**fields: Any) -> LatentDiffiT:
    model = LatentDiffiT(DiffiTConfig(**SMALL | fields)).eval()
    randomise(model, std=0.05, seed=0)
    return model.requires_grad_(False)


def randomise(model: nn.Module, *, std: float = 0.1, seed: int = 1) -> None:
    """Give every trained weight a normal value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std, generator=generator)


def pretrained(model: DiT | LatentDiffiT) -> Pretrained:
    return Pretrained(model.config, model.state_dict(), DiffusionConfig())
