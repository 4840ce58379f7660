"""What is done to a model block by block. The model does not know."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

GRAPHS = 2
"""Of a block at most: of a whole micro-batch, and of the rest that is the last one."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, in order: what lies in its lists that are called ``blocks``."""
    lists = (module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks")
    return [block for found in lists for block in found.children()]


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of each block when it is first called; equal blocks share their graphs."""
    found = blocks(model)
    compiled: Any = partial(torch.compile, dynamic=False, recompile_limit=GRAPHS * len(found))  # types lack the limit
    for block in found:  # the forward alone, so that hooks, such as those that gather parameters, stay outside
        block.forward = compiled(block.forward)


def recompute_blocks(model: nn.Module) -> None:
    """Keep the inputs of each block alone, and go through it again on the way back (Chen et al., arXiv 1604.06174).

    The numbers are the same, since models have no randomness. Comes after compiling, if that is done too.
    """
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
