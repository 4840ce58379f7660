"""Converts between the layout of diffusers' DiTTransformer2DModel and ours."""

# D = width, N = tokens

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from dit.convert.layout import AnyConfig
from dit.convert.pretrained import fitted, null_is_trained, validated
from dit.diffusion.config import DiffusionConfig
from dit.models.config import DiTConfig
from dit.models.layers import NORM_EPS, grid_sinusoid
from dit.weights import DIFFUSERS_WEIGHTS
from storage.config import problem
from storage.errors import InputError

CONFIG: Final = "config.json"
WEIGHTS: Final = DIFFUSERS_WEIGHTS[0]
SCHEDULER: Final = "scheduler/scheduler_config.json"
POSITIONS: Final = "pos_embed.pos_embed"
MLP_RATIO: Final = 4.0
KINDS: Final = ("weight", "bias")

OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
IN_EVERY_BLOCK = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
"""Tensors that our layout has once and theirs copies into each block."""


class Rule(NamedTuple):
    """One of our tensors, and the tensors of theirs that hold it."""

    ours: str
    theirs: list[str]
    copied: bool = False
    """Whether each of theirs is a copy of ours; otherwise ours is their concatenation."""


class Fields(BaseModel):
    """Fields of config.json, with diffusers' defaults. Values that our layout does not have are refused."""

    class_name: Literal["DiTTransformer2DModel", "Transformer2DModel"] = Field(alias="_class_name")
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    attention_bias: Literal[True] = True
    norm_elementwise_affine: Literal[False] = False
    num_attention_heads: int = Field(default=16, ge=1)
    attention_head_dim: int = Field(default=72, ge=1)
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = Field(default=1000, ge=1)


class _Scheduler(BaseModel):
    """Fields of a pipeline's scheduler_config.json, with diffusers' defaults. Other processes than ours are refused."""

    prediction_type: Literal["epsilon"] = "epsilon"
    predict_epsilon: Literal[True] = True
    trained_betas: None = None
    rescale_betas_zero_snr: Literal[False] = False
    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02


def process(scheduler: bytes, where: str) -> DiffusionConfig:
    """The diffusion process of a pipeline, from its scheduler_config.json.

    Raises:
        InputError: it is another process than noise prediction on a linear schedule.
    """
    if b'"FlowMatch' in scheduler:
        raise InputError(f"{where}: {SCHEDULER} is that of a flow on diffusers' time scale, which is not read")
    try:
        found = _Scheduler.model_validate_json(scheduler)
        ends = {"beta_start": found.beta_start, "beta_end": found.beta_end}
        return DiffusionConfig(steps=found.num_train_timesteps, **ends)
    except ValidationError as error:
        raise InputError(f"{where}: {SCHEDULER} is not that of a DiT: {problem(error)}") from error


def from_diffusers(config: bytes, tensors: dict[str, Tensor], where: str) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Config and weights in our layout from those of a diffusers folder.

    The weights must come from a published checkpoint or from here: a model trained with diffusers' own time
    projection has other time embeddings (docs/numerics.md).

    Raises:
        InputError: the config is of another network, the weights do not fit it, or a block has its own embedders.
    """
    ours = _config(config, where)
    rest = dict(tensors)
    positions = rest.pop(POSITIONS, None)  # not saved by default, as it is fixed
    state = {"pos_embed": grid_sinusoid(ours.width, ours.grid) if positions is None else positions}
    for rule in _rules(ours.depth):
        state[rule.ours] = _joined(rule, rest, where)
    if rest:
        raise InputError(f"{where}: unknown tensor {min(rest)}; {CONFIG} says {ours.depth} blocks")
    state = fitted(ours, state, where)
    return (ours if null_is_trained(state) else ours.model_copy(update={"label_dropout": 0.0})), state


def to_diffusers(config: AnyConfig, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights of a DiTTransformer2DModel, no two of which share memory.

    Raises:
        InputError: diffusers has no such model.
    """
    if not isinstance(config, DiTConfig):
        raise InputError("--to: diffusers has no DiffiT; use --to reference")
    if config.num_classes == 0:
        raise InputError("--to: diffusers has no unconditional DiT; use --to reference")
    if config.mlp_ratio != MLP_RATIO:
        raise InputError(f"--to: diffusers' DiT has mlp_ratio 4, not {config.mlp_ratio:g}; use --to reference")
    if config.options:
        raise InputError(f"--to: diffusers' DiT does not have these options: {', '.join(config.options)}")
    weights: dict[str, Tensor] = {}
    for rule in _rules(config.depth):
        count, whole = len(rule.theirs), state[rule.ours]
        parts = [whole] * count if rule.copied else whole.chunk(count)
        weights |= {name: part.clone() for name, part in zip(rule.theirs, parts, strict=True)}
    return _config_json(config), weights


def component(class_name: str | list[str], **fields: Any) -> dict[str, Any]:
    """The JSON of a part of a diffusers folder."""
    return {"_class_name": class_name, "_diffusers_version": version("diffusers"), **fields}


def _rules(depth: int) -> Iterator[Rule]:
    blocks = [(f"blocks.{i}.", f"transformer_blocks.{i}.") for i in range(depth)]
    for kind in KINDS:
        for ours, theirs in OUTSIDE.items():
            yield Rule(f"{ours}.{kind}", [f"{theirs}.{kind}"])
        for our_block, their_block in blocks:
            yield Rule(f"{our_block}attn.qkv.{kind}", [f"{their_block}attn1.to_{part}.{kind}" for part in "qkv"])
            for ours, theirs in IN_BLOCK.items():
                yield Rule(f"{our_block}{ours}.{kind}", [f"{their_block}{theirs}.{kind}"])
    for ours, theirs in IN_EVERY_BLOCK.items():
        yield Rule(ours, [f"{their_block}norm1.emb.{theirs}" for _, their_block in blocks], copied=True)


def _joined(rule: Rule, rest: dict[str, Tensor], where: str) -> Tensor:
    """Our tensor of a rule; theirs are removed from ``rest``."""
    missing = [name for name in rule.theirs if name not in rest]
    if missing:
        raise InputError(f"{where}: no tensor {missing[0]}")
    first, *others = (rest.pop(name) for name in rule.theirs)
    for name, other in zip(rule.theirs[1:], others, strict=True):
        if other.shape != first.shape or other.dtype != first.dtype:
            raise InputError(f"{where}: {name} is of another shape or dtype than {rule.theirs[0]}")
        if rule.copied and not torch.equal(other, first):
            raise InputError(f"{where}: {name} differs from {rule.theirs[0]}; our layout has one for all blocks")
    return first if rule.copied else torch.cat([first, *others])


def _config(data: bytes, where: str) -> DiTConfig:
    try:
        fields = Fields.model_validate_json(data)
    except ValidationError as error:
        raise InputError(f"{where}: {CONFIG} is not that of a DiT: {problem(error)}") from error
    outputs = fields.out_channels or fields.in_channels
    if outputs not in (fields.in_channels, 2 * fields.in_channels):
        raise InputError(f"{where}: out_channels {outputs} is neither in_channels nor twice as many")
    ours = {
        "input_size": fields.sample_size,
        "patch_size": fields.patch_size,
        "in_channels": fields.in_channels,
        "width": fields.num_attention_heads * fields.attention_head_dim,
        "depth": fields.num_layers,
        "heads": fields.num_attention_heads,
        "num_classes": fields.num_embeds_ada_norm,
        "learn_variance": outputs == 2 * fields.in_channels,
    }
    return validated(DiTConfig, ours, where)


def _config_json(config: DiTConfig) -> dict[str, Any]:
    return component(
        "DiTTransformer2DModel",
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_elementwise_affine=False,
        norm_eps=NORM_EPS,
    )
