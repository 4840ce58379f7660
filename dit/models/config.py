"""Configs of the models. A size is a row in a table."""

from abc import ABC
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from storage.config import Config, added
from storage.errors import InputError

HEAD_WIDTH = 32
"""Channels of an attention head of the image-space DiffiT."""

BlockKind = Literal["in_context", "cross_attention", "adaln", "adaln_zero"]
NormKind = Literal["layer", "rms"]
MlpKind = Literal["gelu", "swiglu"]
ConditionKind = Literal["tmsa", "mlp", "token"]
Size = Literal["S", "B", "L", "XL"]
ImageSize = Literal["cifar10", "ffhq64", "digits16"]


class ModelConfig(Config, ABC):
    """Everything that determines a model, apart from its weights."""

    if TYPE_CHECKING:  # each model declares these itself, in an order of its own
        kind: str
        input_size: int
        in_channels: int
        num_classes: int
        label_dropout: float

    @property
    def tokens(self) -> int | None:
        """Tokens of an image; None if their number differs between layers."""
        return None

    @property
    def uses_dropout(self) -> bool:
        """Whether training drops anything but labels."""
        return False


class TransformerShape(Config, ABC):
    """Size of a transformer. See `SIZES` for the published ones."""

    width: int = Field(default=1152, ge=4)
    """Channels of a token. Must be divisible by 4 and by the number of heads."""
    depth: int = Field(default=28, ge=1)
    """Number of blocks."""
    heads: int = Field(default=16, ge=1)
    """Attention heads per block."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of a block's MLP, as a multiple of the width."""


class PatchTransformerConfig(TransformerShape, ModelConfig, ABC):
    """A transformer over the patches of a latent."""

    input_size: int = Field(default=32, ge=1)
    """Height and width of the latent, in latent pixels."""
    patch_size: int = Field(default=2, ge=1)
    """Side of the square patch that becomes one token, in latent pixels."""
    in_channels: int = Field(default=4, ge=1)
    """Channels of the latent."""
    num_classes: int = Field(default=1000, ge=0)
    """Number of classes; the null label is the number after the last class. 0: unconditional."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a training label is replaced by the null label."""
    learn_variance: bool = True
    """Whether the model also predicts the variance, with as many output channels again."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, as the position table needs")
        return self

    @property
    def out_channels(self) -> int:
        """Channels of the output: those of the data, then the variance if it is learned."""
        return self.in_channels * (2 if self.learn_variance else 1)

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid**2


class BackboneOptions(Config, ABC):
    """Later changes of DiT's block, as LightningDiT (Yao et al., arXiv 2501.01423) has them. The defaults are DiT's."""

    norm: NormKind = added("layer")
    """Norm before attention, MLP and head: ``layer`` norm, or root mean square (``rms``) with a learned weight."""
    mlp: MlpKind = added("gelu")
    """Hidden units of a block's MLP: ``gelu``, or gated (``swiglu``), two thirds as many."""
    rope: bool = added(False)
    """Whether queries and keys are rotated by row and column of their token (RoPE), besides the position table."""
    qk_norm: bool = added(False)
    """Whether each head's queries and keys are normed (RMS, with a learned weight), which keeps bfloat16 stable."""


class DiTConfig(BackboneOptions, PatchTransformerConfig):
    """A diffusion transformer (Peebles & Xie, arXiv 2212.09748). See `dit_config` for the published sizes."""

    kind: Literal["dit"] = "dit"
    """Model family."""
    block: BlockKind = "adaln_zero"
    """How a block is conditioned on time and class."""

    @model_validator(mode="after")
    def _rotates(self) -> Self:
        if self.rope and self.block == "in_context":
            raise ValueError("rope: the condition's tokens of an in_context block have no row; use another block")
        if self.rope and self.width // self.heads % 4:
            raise ValueError(f"rope: heads of {self.width // self.heads} channels are not a multiple of 4")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The backbone options that are not DiT's own, by name."""
        fields = BackboneOptions.model_fields.items()
        return {name: getattr(self, name) for name, field in fields if getattr(self, name) != field.default}


class ConditionOption(Config, ABC):
    """DiffiT's block and two that its paper compares it with (arXiv 2312.02139, ablations). The default is DiffiT's."""

    condition: ConditionKind = added("tmsa")
    """How a block sees time and class: in queries, keys and values of its attention (``tmsa``), in the hidden units of
    its MLP alone (``mlp``), or as a ``token`` of its own that the attention sees beside those of the image."""


class DiffiTConfig(ConditionOption, PatchTransformerConfig):
    """A latent DiffiT (Hatamizadeh et al., arXiv 2312.02139). See `diffit_config` for sizes."""

    kind: Literal["diffit"] = "diffit"
    """Model family."""


class UShape(Config, ABC):
    """Size of an image-space DiffiT. See `IMAGE_SIZES` for the published ones."""

    stem_width: int = Field(default=128, ge=1)
    """Channels after the first convolution."""
    widths: tuple[int, ...] = Field(default=(128, 256, 256, 256), min_length=1)
    """Channels at each resolution, where each resolution is half of the previous. Multiples of 32: one attention head
    for each 32."""
    depths: tuple[Annotated[int, Field(ge=1)], ...] = (4, 4, 4, 4)
    """Residual blocks at each resolution on the way down, and again on the way up."""
    window: int = Field(default=8, ge=1)
    """Side of the attention windows at every resolution, in pixels of that resolution."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of a block's MLP, as a multiple of its width."""
    time_width: int = Field(default=512, ge=1)
    """Channels of the embedded noise level."""


class DiffiTImageConfig(ConditionOption, UShape, ModelConfig):
    """An image-space DiffiT (Hatamizadeh et al., arXiv 2312.02139). See `diffit_image_config` for sizes."""

    kind: Literal["diffit_image"] = "diffit_image"
    """Model family."""
    input_size: int = Field(default=64, ge=1)
    """Height and width of the images, in pixels."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of the images."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout probability before a block's convolution."""
    num_classes: int = Field(default=0, ge=0)
    """Number of classes; the null label is the number after the last class. 0: unconditional."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a training label is replaced by the null label."""
    augmented: bool = False
    """Whether the model is conditioned on how its image was augmented."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.widths) != len(self.depths):
            raise ValueError(f"widths {self.widths} and depths {self.depths} differ in length")
        if any(width < 1 or width % HEAD_WIDTH for width in self.widths):
            raise ValueError(f"widths {self.widths} are not multiples of {HEAD_WIDTH}, the width of a head")
        unit = self.window * 2 ** (len(self.widths) - 1)
        if self.input_size % unit:
            reason = f"{len(self.widths)} resolutions with windows of {self.window} need a multiple of {unit}"
            raise ValueError(f"input_size {self.input_size}: {reason}")
        return self

    @property
    def uses_dropout(self) -> bool:
        """See `ModelConfig`."""
        return self.dropout > 0


SIZES: dict[Size, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}
"""The published sizes (arXiv 2212.09748, table 1)."""

LIGHTNING: dict[str, Any] = {
    "input_size": 16, "in_channels": 32, "learn_variance": False, "norm": "rms", "mlp": "swiglu", "rope": True,
}  # fmt: skip
"""What LightningDiT (arXiv 2501.01423) has otherwise than DiT. Published is XL/1, at 256 pixels."""

IMAGE_SIZES: dict[ImageSize, dict[str, Any]] = {
    "cifar10": {
        "input_size": 32, "widths": (128, 256, 256), "depths": (4, 4, 4), "window": 4, "dropout": 0.13,
        "augmented": True,
    },
    "ffhq64": {
        "input_size": 64, "widths": (128, 256, 256, 256), "depths": (4, 4, 4, 4), "window": 8, "dropout": 0.05,
        "augmented": True,
    },
    "digits16": {
        "input_size": 16, "stem_width": 32, "widths": (32, 32, 64), "depths": (1, 1, 1), "window": 4,
        "time_width": 128, "dropout": 0.0,
    },
}  # fmt: skip
"""The published image-space models (arXiv 2312.02139) and one that a CPU trains on digits."""


def dit_config(name: str, **fields: Any) -> DiTConfig:
    """The config of a published model such as ``"XL/2"`` (size, patch size), with other fields as given.

    Raises:
        InputError: there is no such size.

    Examples:
        >>> config = dit_config("XL/2")
        >>> config.depth, config.width, config.tokens
        (28, 1152, 256)
        >>> dit_config("B/4", block="cross_attention", num_classes=10).block
        'cross_attention'
    """
    return DiTConfig.model_validate(_sized(name) | fields)


def sit_config(name: str, **fields: Any) -> DiTConfig:
    """The config of a SiT (arXiv 2401.08740) such as ``"XL/2"`` (size, patch size), with other fields as given.

    It is DiT without a learned variance. The published files have DiT's outputs, of which SiT does not use the second
    half.

    Raises:
        InputError: there is no such size.
    """
    return dit_config(name, **{"learn_variance": False} | fields)


def lightning_config(name: str, **fields: Any) -> DiTConfig:
    """The config of a LightningDiT such as ``"XL/1"`` (size, patch size), with other fields as given.

    Raises:
        InputError: there is no such size.
    """
    return dit_config(name, **LIGHTNING | fields)


def diffit_config(name: str, **fields: Any) -> DiffiTConfig:
    """The config of a latent DiffiT such as ``"XL/2"`` (size, patch size), with other fields as given.

    The published model is XL/2, with the depth that its parameter count implies; the other sizes
    have DiT's depth, width and heads.

    Raises:
        InputError: there is no such size.
    """
    return DiffiTConfig.model_validate(_sized(name) | fields)


def diffit_image_config(name: str, **fields: Any) -> DiffiTImageConfig:
    """The config of an image-space DiffiT such as ``"ffhq64"``, with other fields as given.

    Raises:
        InputError: there is no such model.
    """
    if name not in IMAGE_SIZES:
        raise InputError(f"model {name!r}: no such image-space DiffiT; write one of {', '.join(IMAGE_SIZES)}")
    return DiffiTImageConfig.model_validate(IMAGE_SIZES[name] | fields)


def _sized(name: str) -> dict[str, Any]:
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal():
        raise InputError(f"model {name!r}: no such size; write one of {', '.join(SIZES)}, a slash and the patch size")
    return SIZES[size] | {"patch_size": int(patch)}
