"""A DiT from its weights alone. Our names and shapes are those of the published checkpoints."""

# D = width, C = latent channels, p = patch size, N = tokens

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from pydantic import ValidationError
from torch import Tensor

from dit.diffusion.config import DiffusionConfig
from dit.models.config import SIZES, DiTConfig
from dit.models.dit import DiT
from dit.models.layers import grid_sinusoid
from storage.config import problem
from storage.errors import InputError
from storage.latents import VaeInfo

LAYOUT = "only an adaLN-Zero DiT has this layout"
TABLE_ERROR = 1e-5
HEADS = {size["width"]: size["heads"] for size in SIZES.values()}
"""Heads of the published sizes, by width. A checkpoint does not record the number of heads."""


@dataclass(frozen=True)
class Pretrained:
    """An adaLN-Zero DiT that was trained elsewhere or here."""

    config: DiTConfig
    """Config of the network."""
    state: dict[str, Tensor]
    """Its weights in float32, in the layout of the published checkpoints."""
    diffusion: DiffusionConfig
    """Diffusion process that it reverses: the published one, unless its card says otherwise."""
    scales: VaeInfo | None = None
    """Scaling of its latents, if its card records it; else that of the autoencoder."""
    vae: str | None = None
    """Location of the autoencoder of its latents, if it comes with one."""

    def build(self, device: torch.device | str = "cpu") -> DiT:
        """The model, in evaluation mode."""
        with torch.device("meta"):  # skips the initial weights
            model = DiT(self.config)
        model.load_state_dict(self.state, assign=True)
        return model.to(device).eval().requires_grad_(False)


def infer(tensors: dict[str, Tensor], heads: int | None, where: str) -> DiTConfig:
    """The config, from the shapes of the weights.

    The last row of the label table is taken as the null label; the shapes do not show it.

    Args:
        tensors: weights in the layout of the published checkpoints.
        heads: attention heads, which no shape shows; None for those of the published size with this width.
        where: location of the weights, for errors.

    Raises:
        InputError: a tensor is missing or of an unusable shape, or the heads are not known.
    """
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, where)
    _, tokens, _ = _shape(tensors, "pos_embed", 3, where)
    hidden, _ = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, where)
    outputs, _ = _shape(tensors, "final_layer.linear.weight", 2, where)
    if outputs not in (patch**2 * channels, 2 * patch**2 * channels):
        name, numbers = "final_layer.linear.weight", f"({outputs}, {width})"
        raise InputError(f"{where}: {name} {numbers} fits neither noise alone nor noise and variance; {LAYOUT}")
    table = "y_embedder.embedding_table.weight"
    fields = {
        "input_size": isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "width": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "heads": HEADS.get(width) if heads is None else heads,
        "mlp_ratio": hidden / width,
        "num_classes": _shape(tensors, table, 2, where)[0] - 1 if table in tensors else 0,
        "learn_variance": outputs == 2 * patch**2 * channels,
    }
    if fields["heads"] is None:
        unknown = f"a checkpoint does not record the number of heads, and no published DiT has width {width}"
        raise InputError(f"{where}: {unknown}; pass --heads")
    return validated(fields, where)


def validated(fields: Mapping[str, object], where: str) -> DiTConfig:
    """A config of these fields.

    Raises:
        InputError: the fields do not fit each other.
    """
    try:
        return DiTConfig.model_validate(fields)
    except ValidationError as error:
        raise InputError(f"{where}: not a DiT: {problem(error)}") from error


def fitted(config: DiTConfig, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights in float32, checked against the config.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape; or the position table is not the fixed one.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in DiT(config).state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise InputError(f"{where}: no tensor {name}; {LAYOUT}")
        if name not in expected:
            raise InputError(f"{where}: unknown tensor {name}; {LAYOUT}")
        if tensors[name].shape != expected[name] or not tensors[name].is_floating_point():
            shape, needed = tuple(tensors[name].shape), tuple(expected[name])
            raise InputError(f"{where}: {name} is {tensors[name].dtype} {shape}, not floats {needed}; {LAYOUT}")
    _check_positions(config, tensors["pos_embed"], where)
    return {name: tensors[name].float() for name in expected}


def _check_positions(config: DiTConfig, table: Tensor, where: str) -> None:
    error = float((table.float() - grid_sinusoid(config.width, config.grid)).abs().max())
    if not error <= max(TABLE_ERROR, torch.finfo(table.dtype).eps):
        raise InputError(
            f"{where}: pos_embed is {error:.2g} off the fixed sin-cos table, and learned ones are not read"
        )


def _shape(tensors: dict[str, Tensor], name: str, dimensions: int, where: str) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f"{where}: no tensor {name}; {LAYOUT}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise InputError(f"{where}: {name} has shape {shape}, not {dimensions} dimensions; {LAYOUT}")
    return shape
