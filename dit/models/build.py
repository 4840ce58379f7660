"""From a config to a model."""

from torch import nn

from dit.models.config import DiTConfig
from dit.models.dit import DiT

MODELS = {"dit": DiT}
"""A class for each `kind` of model config."""


def build(config: DiTConfig) -> nn.Module:
    """A freshly initialised model on torch's default device, drawn from torch's generator."""
    return MODELS[config.kind](config)
