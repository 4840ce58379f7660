"""The table of models, and how one is built from its config. A new model is a module and a row here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field
from torch import nn

from dit.models.choice import DiffiTChoice, DiffiTImageChoice, DiTChoice, ModelChoice
from dit.models.config import DiffiTConfig, DiffiTImageConfig, DiTConfig, ModelConfig
from dit.models.diffit_image import ImageDiffiT
from dit.models.diffit_latent import LatentDiffiT
from dit.models.dit import DiT


@dataclass(frozen=True)
class Model:
    """A kind of model.

    Args:
        choice: its fields in a recipe.
        config: everything that determines it; its ``kind`` is that of the choice.
        network: builds it from its config.
    """

    choice: type[ModelChoice]
    config: type[ModelConfig]
    network: Callable[[Any], nn.Module]


MODELS = (
    Model(DiTChoice, DiTConfig, DiT),
    Model(DiffiTChoice, DiffiTConfig, LatentDiffiT),
    Model(DiffiTImageChoice, DiffiTImageConfig, ImageDiffiT),
)

if TYPE_CHECKING:
    AnyModelChoice: TypeAlias = ModelChoice
    AnyModelConfig: TypeAlias = ModelConfig
else:
    AnyModelChoice = Annotated[reduce(or_, [model.choice for model in MODELS]), Field(discriminator="kind")]
    """A choice of any model; ``kind`` says which."""
    AnyModelConfig = Annotated[reduce(or_, [model.config for model in MODELS]), Field(discriminator="kind")]
    """The config of any model; ``kind`` says which."""


def build(config: ModelConfig) -> nn.Module:
    """A freshly initialised model on torch's default device, drawn from torch's generator.

    Examples:
        >>> import torch
        >>> from dit.models.config import dit_config
        >>> model = build(dit_config("S/2", depth=2, num_classes=10))
        >>> x, t, y = torch.randn(3, 4, 32, 32), torch.rand(3), torch.tensor([0, 9, 10])  # 10 is the null label
        >>> tuple(model(x, t, y).shape)  # prediction and variance
        (3, 8, 32, 32)
    """
    return next(model.network for model in MODELS if isinstance(config, model.config))(config)
