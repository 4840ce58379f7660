"""Compilation, activation checkpointing and the choice of attention, block by block. The model does not know."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dit.devices import device
from dit.models.layers import Attention, attend_by_products

GRAPHS = 2
"""Compiled graphs of a block at most: for a full micro-batch, and for a smaller last one."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model in order: the members of its lists called ``blocks``."""
    lists = (module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks")
    return [block for each in lists for block in each.children()]


def choose_attention(model: nn.Module, autocast: torch.dtype | None) -> None:
    """Let a model compute its attention in the way that is fastest in training on this device."""
    if device().type == "cpu" and autocast is torch.bfloat16:
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = attend_by_products


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of each block when it is first called; equal blocks share their graphs."""
    every_block = blocks(model)
    limit = GRAPHS * len(every_block)
    compiled: Any = partial(torch.compile, dynamic=False, recompile_limit=limit)  # torch's types lack the limit
    for block in every_block:  # only the forward, so that hooks, such as FSDP's gathering, stay outside the graph
        block.forward = compiled(block.forward)


def recompute_blocks(model: nn.Module) -> None:
    """Keep only the inputs of each block, and recompute it in the backward pass (Chen et al., arXiv 1604.06174).

    The numbers are the same, since models have no randomness. Call it after `compile_blocks`.
    """
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
