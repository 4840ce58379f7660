"""A DiT or a latent DiffiT from its weights alone, in a published layout (`dit.convert.layout`)."""

# D = width, C = latent channels, p = patch size, N = tokens

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, TypedDict, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import Parameter

from dit.convert.layout import BIAS, POSITIONS, ROPE, TABLE, TIME_QKV, AnyConfig, check_tables, published, tables
from dit.convert.process import Found, Told
from dit.diffusion.config import FlowConfig
from dit.models.build import build
from dit.models.config import SIZES, DiffiTConfig, DiTConfig
from storage.channels import ChannelScale
from storage.config import problem
from storage.errors import InputError
from storage.latents import VaeInfo

LAYOUT = "only an adaLN-Zero DiT or a latent DiffiT with TMSA has this layout"
HEADS = {size["width"]: size["heads"] for size in SIZES.values()}
"""Heads of the published sizes, by width. A checkpoint does not record the number of heads."""


FoundConfig = TypeVar("FoundConfig", DiTConfig, DiffiTConfig)


class Hints(TypedDict, total=False):
    """What some checkpoints do not record, as the user says it. None: not said."""

    heads: int | None
    """Attention heads."""
    classes: int | None
    """Classes: as many as the label table has rows, if there was no label dropout in training; else one fewer."""
    latent_size: int | None
    """Side of the latents, if the file lacks the position table."""
    process: Told | None
    """Diffusion process."""
    latent_statistics: str | None
    """File with the tensors ``mean`` and ``std`` of the latent channels, if they were normalised, by path or URL."""
    class_names: str | None
    """Text file with the names of the classes, one a line in the order of the labels, by path or URL."""


@dataclass(frozen=True)
class Pretrained:
    """An adaLN-Zero DiT or a latent DiffiT that was trained elsewhere or here."""

    config: AnyConfig
    """Config of the network."""
    state: dict[str, Tensor]
    """Its weights in float32, by our names."""
    diffusion: Found
    """Diffusion process that it reverses: the published one, unless user or card say otherwise."""
    scales: VaeInfo | None = None
    """Scaling of its latents, if its card records it; else that of the autoencoder."""
    channels: ChannelScale | None = None
    """Statistics that each channel of its latents was normalised by; None for the autoencoder's scaling."""
    vae: str | None = None
    """Location of the autoencoder of its latents, if it comes with one."""
    class_names: tuple[str, ...] | None = None
    """Names of its classes, if they are known."""
    notes: tuple[str, ...] = ()
    """What was read or assumed without being asked for, a line each."""

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """The model, in evaluation mode."""
        with torch.device("meta"):  # skips the initial weights
            model = build(self.config)
        model.load_state_dict(self.state, assign=True)
        return model.to(device).eval().requires_grad_(False)


def infer(tensors: dict[str, Tensor], hints: Hints, where: str) -> AnyConfig:
    """The config, from names and shapes of the weights.

    Args:
        tensors: weights in the layout of the published checkpoints.
        hints: what no shape shows. Without it, heads are those of the published size with this width, unless a table
            shows them, and the last row of the label table is the null label.
        where: location of the weights, for errors.

    Raises:
        InputError: a tensor is missing or of an unusable shape, or heads, classes or the latents' side are not known.
    """
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, where)
    gated = "blocks.0.mlp.w12.weight" in tensors
    hidden, inner = _shape(tensors, f"blocks.0.mlp.{'w12' if gated else 'fc1'}.weight", 2, where)
    outputs, _ = _shape(tensors, "final_layer.linear.weight", 2, where)
    if inner != width:
        axes = "(width, channels, patch, patch), so it may be transposed"
        shape = tuple(tensors["x_embedder.proj.weight"].shape)
        raise InputError(f"{where}: x_embedder.proj.weight has shape {shape}, not {axes}; {LAYOUT}")
    if outputs not in (patch**2 * channels, 2 * patch**2 * channels):
        name, numbers = "final_layer.linear.weight", f"({outputs}, {width})"
        raise InputError(f"{where}: {name} {numbers} fits neither noise alone nor noise and variance; {LAYOUT}")
    heads, (classes, null) = hints.get("heads"), _classes(tensors, hints.get("classes"), where)
    fields: dict[str, Any] = {
        "input_size": _latent_size(tensors, hints.get("latent_size"), patch, where),
        "patch_size": patch,
        "in_channels": channels,
        "width": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "heads": _heads(tensors, width, where) if heads is None else heads,
        "mlp_ratio": _ratio_of_gated(hidden // 2, width) if gated else hidden / width,
        "num_classes": classes,
        "learn_variance": outputs == 2 * patch**2 * channels,
        **({} if null else {"label_dropout": 0}),
    }
    if fields["heads"] is None:
        unknown = f"a checkpoint does not record the number of heads, and no published DiT has width {width}"
        raise InputError(f"{where}: {unknown}; pass --heads")
    if any(TIME_QKV in name for name in tensors):
        return validated(DiffiTConfig, fields, where)
    options = {
        "norm": "rms" if "final_layer.norm_final.weight" in tensors else "layer",
        "mlp": "swiglu" if gated else "gelu",
        "rope": ROPE[0] in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
    }
    return validated(DiTConfig, fields | options, where)


def _heads(tensors: dict[str, Tensor], width: int, where: str) -> int | None:
    """The number of heads, if a table of DiffiT's or LightningDiT's shows it, or the width."""
    bias = f"blocks.0{BIAS}"
    if bias in tensors:
        return _shape(tensors, bias, 2, where)[1]
    if ROPE[0] in tensors:
        return width // _shape(tensors, ROPE[0], 2, where)[1]
    return HEADS.get(width)


def _ratio_of_gated(hidden: int, width: int) -> float:
    """The ``mlp_ratio`` of a gated MLP, which has two thirds of the units; the published one if it fits."""
    return 4.0 if 2 * (4 * width) // 3 == hidden else -(-3 * hidden // 2) / width


def with_null_label(model: Pretrained) -> dict[str, Tensor]:
    """The weights to write: a null label that was not trained is zeros, which tells readers so."""
    if not model.config.num_classes or model.config.label_dropout:
        return model.state
    classes = model.state[TABLE][:-1]
    return model.state | {TABLE: torch.cat([classes, classes.new_zeros(1, model.config.width)])}


def completed(config: AnyConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the fixed tables and a null label of zeros, where the file lacks them."""
    found = tables(config) | tensors
    if TABLE in found and len(found[TABLE]) == config.num_classes:
        found[TABLE] = torch.cat([found[TABLE], found[TABLE].new_zeros(1, config.width)])
    return found


def described(model: Pretrained) -> list[str]:
    """What the model is, and what was assumed to read it, a line each."""
    config = model.config
    latent = f"latents {config.in_channels}x{config.input_size}x{config.input_size}"
    shape = f"depth {config.depth}, width {config.width}, {config.heads} heads, patches of {config.patch_size}"
    kind = "DiffiT" if isinstance(config, DiffiTConfig) else "DiT"
    options = [] if isinstance(config, DiffiTConfig) else [f"{name} {value}" for name, value in config.options.items()]
    flow = model.diffusion if isinstance(model.diffusion, FlowConfig) else None
    trained = [f"{flow.predict} of a flow on the {flow.path} path"] if flow else []
    return [", ".join([f"{kind} of {shape}", *options, latent, _labels(config), *trained]), *model.notes]


def _labels(config: AnyConfig) -> str:
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


def validated(kind: type[FoundConfig], fields: Mapping[str, object], where: str) -> FoundConfig:
    """A config of these fields.

    Raises:
        InputError: the fields do not fit each other.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise InputError(f"{where}: not a DiT: {problem(error)}") from error


def fitted(config: AnyConfig, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Copies of the weights in float32 by our names, checked against the config.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape; or a fixed table has other numbers.
    """
    with torch.device("meta"):
        network = build(config).state_dict()
    expected = {published(name): tensor.shape for name, tensor in network.items()}
    fixed = tables(config).keys()
    for name in sorted(expected.keys() | fixed | tensors.keys()):
        if name not in tensors:
            raise InputError(f"{where}: no tensor {name}; {LAYOUT}")
        if name not in expected and name not in fixed:
            raise InputError(f"{where}: unknown tensor {name}; {LAYOUT}")
        if not is_plain(tensors[name]):
            raise InputError(f"{where}: {name} is sparse, a part of a tensor, or without values; save plain tensors")
        if name not in expected:
            continue
        if tensors[name].shape != expected[name] or not tensors[name].is_floating_point():
            shape, needed = tuple(tensors[name].shape), tuple(expected[name])
            raise InputError(f"{where}: {name} is {tensors[name].dtype} {shape}, not floats {needed}; {LAYOUT}")
        if not tensors[name].float().isfinite().all():
            raise InputError(f"{where}: {name} is not finite, so the training failed; use an earlier checkpoint")
    check_tables(config, tensors, where)
    # Copies, because the file is mapped: who overwrites it would change these numbers, or end the process
    return {name: tensors[published(name)].detach().to(torch.float32, copy=True) for name in network}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is whole, dense and on the CPU."""
    return type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"


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
