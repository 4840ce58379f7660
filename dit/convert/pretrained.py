"""A DiT from its weights alone. Our names and shapes are those of the published checkpoints."""

# D = width, C = latent channels, p = patch size, N = tokens

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Literal, TypedDict

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import Parameter

from dit.diffusion.config import DiffusionConfig
from dit.models.config import SIZES, DiTConfig
from dit.models.dit import DiT
from dit.models.layers import grid_sinusoid
from storage.config import problem
from storage.errors import InputError
from storage.latents import VaeInfo

TABLE = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
LAYOUT = "only an adaLN-Zero DiT has this layout"
TABLE_ERROR = 1e-5
HEADS = {size["width"]: size["heads"] for size in SIZES.values()}
"""Heads of the published sizes, by width. A checkpoint does not record the number of heads."""


class Hints(TypedDict, total=False):
    """What some checkpoints do not record, as the user says it. None: not said."""

    heads: int | None
    """Attention heads."""
    classes: int | None
    """Classes: as many as the label table has rows, if there was no label dropout in training; else one fewer."""
    latent_size: int | None
    """Side of the latents, if the file lacks the position table."""
    process: Literal["gaussian"] | None
    """Diffusion process."""


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
    notes: tuple[str, ...] = ()
    """What was read or assumed without being asked for, a line each."""

    def build(self, device: torch.device | str = "cpu") -> DiT:
        """The model, in evaluation mode."""
        with torch.device("meta"):  # skips the initial weights
            model = DiT(self.config)
        model.load_state_dict(self.state, assign=True)
        return model.to(device).eval().requires_grad_(False)


def infer(tensors: dict[str, Tensor], hints: Hints, where: str) -> DiTConfig:
    """The config, from the shapes of the weights.

    Args:
        tensors: weights in the layout of the published checkpoints.
        hints: what no shape shows. Without it, heads are those of the published size with this width, and the last
            row of the label table is the null label.
        where: location of the weights, for errors.

    Raises:
        InputError: a tensor is missing or of an unusable shape, or heads, classes or the latents' side are not known.
    """
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, where)
    hidden, inner = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, where)
    outputs, _ = _shape(tensors, "final_layer.linear.weight", 2, where)
    if inner != width:
        axes = "(width, channels, patch, patch), so it may be transposed"
        shape = tuple(tensors["x_embedder.proj.weight"].shape)
        raise InputError(f"{where}: x_embedder.proj.weight has shape {shape}, not {axes}; {LAYOUT}")
    if outputs not in (patch**2 * channels, 2 * patch**2 * channels):
        name, numbers = "final_layer.linear.weight", f"({outputs}, {width})"
        raise InputError(f"{where}: {name} {numbers} fits neither noise alone nor noise and variance; {LAYOUT}")
    heads, (classes, null) = hints.get("heads"), _classes(tensors, hints.get("classes"), where)
    fields = {
        "input_size": _latent_size(tensors, hints.get("latent_size"), patch, where),
        "patch_size": patch,
        "in_channels": channels,
        "width": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "heads": HEADS.get(width) if heads is None else heads,
        "mlp_ratio": hidden / width,
        "num_classes": classes,
        "learn_variance": outputs == 2 * patch**2 * channels,
        **({} if null else {"label_dropout": 0}),
    }
    if fields["heads"] is None:
        unknown = f"a checkpoint does not record the number of heads, and no published DiT has width {width}"
        raise InputError(f"{where}: {unknown}; pass --heads")
    return validated(fields, where)


def with_null_label(model: Pretrained) -> dict[str, Tensor]:
    """The weights to write: a null label that was not trained is zeros, which tells readers so."""
    if not model.config.num_classes or model.config.label_dropout:
        return model.state
    classes = model.state[TABLE][:-1]
    return model.state | {TABLE: torch.cat([classes, classes.new_zeros(1, model.config.width)])}


def completed(config: DiTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the fixed position table and a null label of zeros, where the file lacks them."""
    found = {POSITIONS: grid_sinusoid(config.width, config.grid)} | tensors
    if TABLE in found and len(found[TABLE]) == config.num_classes:
        found[TABLE] = torch.cat([found[TABLE], found[TABLE].new_zeros(1, config.width)])
    return found


def described(model: Pretrained) -> list[str]:
    """What the model is, and what was assumed to read it, a line each."""
    config = model.config
    latent = f"latents {config.in_channels}x{config.input_size}x{config.input_size}"
    shape = f"depth {config.depth}, width {config.width}, {config.heads} heads, patches of {config.patch_size}"
    return [f"DiT of {shape}, {latent}, {_labels(config)}", *model.notes]


def _labels(config: DiTConfig) -> str:
    if config.num_classes == 0:
        return "no classes"
    trained = "" if config.label_dropout else " (not trained, so sample with guidance_scale 1)"
    return f"{config.num_classes} classes, null label {config.num_classes}{trained}"


def _classes(tensors: dict[str, Tensor], told: int | None, where: str) -> tuple[int, bool]:
    """The number of classes, and whether the null label was trained."""
    if TABLE not in tensors:
        if told:
            raise InputError(f"{where}: no tensor {TABLE}, so it has no classes; remove --classes")
        return 0, True
    rows, _ = _shape(tensors, TABLE, 2, where)
    classes = rows - 1 if told is None else told
    if classes < 1 or rows - classes not in (0, 1):
        hint = f"pass --classes {rows}" + (f", or {rows - 1} if the last row is the null label" if rows > 1 else "")
        raise InputError(f"{where}: the label table of {rows} rows does not fit {classes} classes; {hint}")
    return classes, rows > classes and null_is_trained(tensors)


def null_is_trained(tensors: dict[str, Tensor]) -> bool:
    """Whether the last row of the label table is a null label that was trained. One of zeros was not."""
    return bool(tensors[TABLE][-1].any())


def _latent_size(tensors: dict[str, Tensor], told: int | None, patch: int, where: str) -> int:
    if POSITIONS not in tensors:
        if told is None:
            hint = "pass --latent-size, for published models 32 at 256 px and 64 at 512 px"
            raise InputError(f"{where}: no tensor {POSITIONS}, which shows the latents' side; {hint}")
        return told
    _, tokens, _ = _shape(tensors, POSITIONS, 3, where)
    size = isqrt(tokens) * patch
    if told not in (None, size):
        raise InputError(f"{where}: has latents of side {size}, not {told}; remove --latent-size")
    return size


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
        if not _is_plain(tensors[name]):
            raise InputError(f"{where}: {name} is sparse, a part of a tensor, or without values; save plain tensors")
        if not tensors[name].float().isfinite().all():
            raise InputError(f"{where}: {name} is not finite, so the training failed; use an earlier checkpoint")
    _check_positions(config, tensors[POSITIONS], where)
    return {name: tensors[name].detach().float() for name in expected}


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"


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
    if shape == (0,):
        hint = "the file is a shard of DeepSpeed's; run the zero_to_fp32.py that is beside it"
        raise InputError(f"{where}: {name} is empty; {hint}")
    if len(shape) != dimensions or 0 in shape:
        raise InputError(f"{where}: {name} has shape {shape}, not {dimensions} dimensions; {LAYOUT}")
    return shape
