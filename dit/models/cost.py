"""Parameters, operations and memory of a model, counted on the module itself, without weights or arithmetic."""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dit.models.build import build
from dit.models.config import (
    IMAGE_SIZES,
    SIZES,
    BlockKind,
    ModelConfig,
    PatchTransformerConfig,
    diffit_config,
    diffit_image_config,
    dit_config,
    lightning_config,
    sit_config,
)
from storage.errors import InputError

PATCHES = (8, 4, 2)
"""The published patch sizes, in latent pixels."""
FLOAT32 = 4


@dataclass(frozen=True)
class Cost:
    """The size of a model and its operations on one image."""

    parameters: int
    """All parameters, fixed tables included."""
    trained: int
    """Trained parameters."""
    macs: int
    """Multiply-accumulates of a forward pass of one image, in matrix products, convolutions and attention."""

    @property
    def training_flops(self) -> int:
        """FLOP to train on one image: 2 a multiply-accumulate; a backward pass costs twice a forward pass."""
        return 6 * self.macs

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that training holds in float32, without activations."""
        weights, gradients = FLOAT32 * self.parameters, FLOAT32 * self.trained
        return {"weights": weights, "gradients": gradients, "adamw": 2 * gradients, "ema": gradients}


def cost(config: ModelConfig, prepare: Callable[[nn.Module], None] | None = None) -> Cost:
    """Count a model's parameters and the operations of one forward pass on torch's "meta" device.

    Of a transformer whose blocks are alike two depths are counted, and the rest follows.

    Args:
        config: the model.
        prepare: applied to the model before; it may choose what is trained.

    Examples:
        >>> from dit.models.config import dit_config
        >>> dit_xl = cost(dit_config("XL/2"))
        >>> f"{dit_xl.parameters / 1e6:.0f} million parameters, {dit_xl.macs / 1e9:.1f} GMAC an image"
        '675 million parameters, 118.6 GMAC an image'
    """
    if prepare is None and isinstance(config, PatchTransformerConfig) and config.depth > 2:
        one, two = (astuple(_counted(config.model_copy(update={"depth": depth}))) for depth in (1, 2))
        return Cost(*(second + (config.depth - 2) * (second - first) for first, second in zip(one, two, strict=True)))
    return _counted(config, prepare)


def _counted(config: ModelConfig, prepare: Callable[[nn.Module], None] | None = None) -> Cost:
    with torch.device("meta"):
        model = build(config)
        if prepare is not None:
            prepare(model)
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        y = torch.empty(1, dtype=torch.long) if config.num_classes else None
        with FlopCounterMode(display=False) as counter:
            model.eval()(x, torch.empty(1), y)
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Cost(sum(p.numel() for p in parameters), trained, counter.get_total_flops() // 2)


def activations(
    config: ModelConfig,
    batch: int,
    autocast: torch.dtype | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
) -> int:
    """Bytes that a forward pass of a batch keeps for the backward pass, counted on tensors without data.

    Memory that kernels use while they run is not counted.

    Args:
        config: the model.
        batch: images in a pass.
        autocast: lower precision of the pass; None computes in float32.
        prepare: applied to the model before it is trained, such as `recompute_blocks`.
    """
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.device("meta"):  # where initial values are not drawn: torch cannot draw all of them without data
        model = build(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if prepare is not None:
            prepare(model)
        x = torch.empty(batch, config.in_channels, config.input_size, config.input_size)
        y = torch.empty(batch, dtype=torch.long) if config.num_classes else None
        lower = torch.autocast("cpu", autocast, enabled=autocast is not None)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), lower:
            model(x, torch.empty(batch), y)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for storage, size in storages.items() if storage not in weights)


def catalogue(latent: int) -> Iterator[tuple[str, ModelConfig]]:
    """Every size, patch size and block of DiT, and the sizes of the other models, each with a name.

    Args:
        latent: side of the latent, in latent pixels. That of a LightningDiT is half as long, as its autoencoder
            halves images once more; the models on images keep their own size.

    Raises:
        InputError: the latent does not divide into the largest patches.
    """
    if latent < 1 or latent % max(PATCHES):
        raise InputError(f"latent: {latent} is not a multiple of {max(PATCHES)}, the largest patch size")
    names = [f"{size}/{patch}" for size in SIZES for patch in PATCHES]
    for block in get_args(BlockKind):
        for name in names:
            yield f"DiT-{name} {block}", dit_config(name, input_size=latent, block=block)
    for size in SIZES:
        yield f"SiT-{size}/2", sit_config(f"{size}/2", input_size=latent)
    for size in SIZES:
        yield f"LightningDiT-{size}/1", lightning_config(f"{size}/1", input_size=latent // 2)
    for name in names:
        yield f"DiffiT-{name}", diffit_config(name, input_size=latent)
    for name in IMAGE_SIZES:
        yield f"DiffiT {name}", diffit_image_config(name)
