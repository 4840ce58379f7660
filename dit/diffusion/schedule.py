"""Noise variance by step."""

import torch
from torch import Tensor

from dit.diffusion.config import DiffusionConfig


def betas(config: DiffusionConfig) -> Tensor:
    """Noise variance of each step, float64 (steps,)."""
    return SCHEDULES[config.schedule](config)


def _linear(config: DiffusionConfig) -> Tensor:
    return torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64)


SCHEDULES = {"linear": _linear}
