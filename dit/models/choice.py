"""The choice of a model in a recipe: what data and process do not determine."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from dit.models.config import (
    IMAGE_SIZES,
    SIZES,
    BackboneOptions,
    BlockKind,
    ConditionOption,
    DiffiTConfig,
    DiffiTImageConfig,
    DiTConfig,
    ImageSize,
    ModelConfig,
    Size,
    TransformerShape,
    UShape,
)
from storage.config import Config
from storage.errors import InputError


@dataclass(frozen=True)
class DataSpec:
    """What data and process determine about a model."""

    channels: int
    side: int
    """Height and width, in latent pixels or pixels."""
    num_classes: int
    learn_variance: bool
    """Whether the process learns a variance."""
    augmented: bool = False
    """Whether training augments the images, so the model needs augmentation labels."""


class Shape(TransformerShape):
    """Width, depth and heads of your own."""


class ImageShape(UShape):
    """Widths, depths and window of your own."""


class ModelChoice(Config, ABC):
    """Fields of every model."""

    conditional: bool = True
    """Whether the model is conditioned on the class."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a training label is replaced by the null label, as classifier-free guidance needs."""

    def _common(self, data: DataSpec) -> dict[str, Any]:
        return {
            "input_size": data.side,
            "in_channels": data.channels,
            "num_classes": data.num_classes if self.conditional else 0,
            "label_dropout": self.label_dropout,
        }

    @abstractmethod
    def config(self, data: DataSpec) -> ModelConfig:
        """The full config.

        Raises:
            InputError, ValidationError: choice and data do not fit each other.

        Examples:
            >>> choice = DiTChoice(size=Shape(depth=2, width=64, heads=2), patch_size=4)
            >>> choice.config(DataSpec(channels=3, side=32, num_classes=10, learn_variance=False)).tokens
            64
        """


class _PatchChoice(ModelChoice, ABC):
    """Fields of the transformers over patches."""

    size: Size | Shape = "XL"
    """Published size (S, B, L or XL), or width, depth and heads of your own."""
    patch_size: int = Field(default=2, ge=1)
    """Side of the square patch that becomes one token, in latent pixels."""

    def _patches(self, data: DataSpec) -> dict[str, Any]:
        if data.augmented:
            raise InputError("train.augmentation: needs a diffit_image model; set it to 0")
        size = self.size
        shape = SIZES[size] if isinstance(size, str) else dict(size)
        return {**self._common(data), **shape, "patch_size": self.patch_size, "learn_variance": data.learn_variance}


class DiTChoice(BackboneOptions, _PatchChoice):
    """A diffusion transformer (Peebles & Xie, arXiv 2212.09748)."""

    kind: Literal["dit"] = "dit"
    """Model family."""
    block: BlockKind = "adaln_zero"
    """How a block is conditioned on time and class. The published results use ``adaln_zero``."""

    def config(self, data: DataSpec) -> DiTConfig:
        """The full config.

        Raises:
            InputError, ValidationError: choice and data do not fit each other.
        """
        options = {name: getattr(self, name) for name in BackboneOptions.model_fields}
        return DiTConfig(**self._patches(data), block=self.block, **options)


class DiffiTChoice(ConditionOption, _PatchChoice):
    """A latent DiffiT (Hatamizadeh et al., arXiv 2312.02139)."""

    kind: Literal["diffit"] = "diffit"
    """Model family."""

    def config(self, data: DataSpec) -> DiffiTConfig:
        """The full config.

        Raises:
            InputError, ValidationError: choice and data do not fit each other.
        """
        return DiffiTConfig(**self._patches(data), condition=self.condition)


class DiffiTImageChoice(ConditionOption, ModelChoice):
    """An image-space DiffiT (Hatamizadeh et al., arXiv 2312.02139). It does not learn a variance."""

    kind: Literal["diffit_image"] = "diffit_image"
    """Model family."""
    size: ImageSize | ImageShape = "cifar10"
    """Published model of a data set (``cifar10``, ``ffhq64``), the demo's ``digits16``, or a shape of your own."""
    conditional: bool = False
    """Whether the model is conditioned on the class."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout probability before a block's convolution. Null: that of the size."""

    def config(self, data: DataSpec) -> DiffiTImageConfig:
        """The full config.

        Raises:
            ValidationError: choice and data do not fit each other.
        """
        size = self.size
        shape = IMAGE_SIZES[size] if isinstance(size, str) else {"dropout": 0.0} | dict(size)
        dropout = {} if self.dropout is None else {"dropout": self.dropout}
        common = self._common(data) | {"augmented": data.augmented, "condition": self.condition}
        return DiffiTImageConfig.model_validate(shape | common | dropout)
