"""From a config to a model."""

from collections.abc import Callable
from typing import Any

from torch import nn

from dit.models.config import ModelConfig
from dit.models.diffit_image import ImageDiffiT
from dit.models.diffit_latent import LatentDiffiT
from dit.models.dit import DiT

MODELS: dict[str, Callable[[Any], nn.Module]] = {"dit": DiT, "diffit": LatentDiffiT, "diffit_image": ImageDiffiT}
"""A class for each `kind` of model config."""


def build(config: ModelConfig) -> nn.Module:
    """A freshly initialised model on torch's default device, drawn from torch's generator."""
    return MODELS[config.kind](config)
