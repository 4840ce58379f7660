"""The layout of published checkpoints: their names of our tensors, and the tables that they keep beside the weights.

Ours are the names of DiT, SiT and LightningDiT. Latent DiffiT has two others, and a table of the relative positions of
tokens in every block; LightningDiT has tables of the angles of RoPE. A table follows from the config. It is written for
the sake of their readers, and compared when it is read: one of another convention would belong to another network.
REPA has projectors beside a SiT.
"""

# D = width, N = tokens of an image = w * w, h = heads

from typing import Final

import torch
from torch import Tensor

from dit.models.config import DiffiTConfig, DiTConfig
from dit.models.layers import grid_rotation, grid_sinusoid
from storage.errors import InputError

AnyConfig = DiTConfig | DiffiTConfig
TABLE: Final = "y_embedder.embedding_table.weight"
POSITIONS: Final = "pos_embed"
ROPE: Final = "feat_rope.freqs_cos", "feat_rope.freqs_sin"
TIME_QKV: Final = ".attn.qkv_temb."
BIAS: Final = ".attn.relative_position_bias_table"
PROJECTORS: Final = "projectors."
"""What the names of REPA's heads begin with, which only its training uses."""
DECODER: Final = "decoder_blocks."
"""What older files of REPA call the blocks behind the one that is projected. They are counted from 0 again."""
INDEX: Final = "attn.relative_position_index"
RENAMED: Final = {".attn.time_qkv.": TIME_QKV, ".attn.bias.table": BIAS}
"""Parts of our names of a DiffiT, and theirs."""
TABLE_ERROR: Final = 1e-5


def published(name: str) -> str:
    """The published name of one of our tensors."""
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def of_repa(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of REPA's network without projectors and with all blocks in a row; and what was left out, a line."""
    left_out = [name for name in tensors if name.startswith(PROJECTORS)]
    first = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    found = {_in_a_row(name, first): tensor for name, tensor in tensors.items() if name not in left_out}
    return found, [f"left out: {len(left_out)} tensors of REPA's projectors"] if left_out else []


def _in_a_row(name: str, first: int) -> str:
    block, _, rest = name.removeprefix(DECODER).partition(".")
    return f"blocks.{first + int(block)}.{rest}" if name.startswith(DECODER) and block.isdecimal() else name


def tables(config: AnyConfig) -> dict[str, Tensor]:
    """The tables that belong to a model, by name."""
    found = {POSITIONS: grid_sinusoid(config.width, config.grid)}
    if isinstance(config, DiffiTConfig):
        index = relative_index(config.grid)
        return found | {f"blocks.{block}.{INDEX}": index for block in range(config.depth)}
    if config.rope:  # each angle counts for two neighbouring channels
        angles = grid_rotation(config.width // config.heads, config.grid, torch.device("cpu"))
        found |= dict(zip(ROPE, angles.repeat_interleave(2, dim=-1), strict=True))
    return found


def relative_index(window: int) -> Tensor:
    """The row of the bias table for each query and key, (N, N): (dy + w - 1)(2w - 1) + dx + w - 1, query minus key."""
    place = torch.arange(window**2)
    dy, dx = (of[:, None] - of for of in (place // window, place % window))
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def check_tables(config: AnyConfig, tensors: dict[str, Tensor], where: str) -> None:
    """Check the tables of a checkpoint.

    Raises:
        InputError: one is of another shape or has other numbers.
    """
    for name, table in tables(config).items():
        found = tensors[name]
        if found.shape != table.shape:
            raise InputError(f"{where}: {name} has shape {tuple(found.shape)}, not {tuple(table.shape)}")
        error = float((found.double() - table).abs().max())
        if not error <= max(TABLE_ERROR, torch.finfo(found.dtype).eps if found.is_floating_point() else 0):
            kind = "sin-cos table" if name == POSITIONS else "table of this layout"
            raise InputError(f"{where}: {name} is {error:.2g} off the fixed {kind}, and learned ones are not read")
