"""The dispersive loss (Wang & He, arXiv 2506.09027) pushes apart what a block makes of the images of a batch:

    L = log mean_ij exp(-d_ij / tau),   d_ij = mean over the M numbers of z_i and z_j of (z_i - z_j)^2

where z_i is the block's output for image i, and i and j run over the global batch. L is no mean over images, so the
gradients of parts of a batch do not add up to its own. But its gradient by the outputs follows from the outputs alone,

    dL/dz_i = -4 / (tau M) sum_j p_ij (z_i - z_j),   p_ij = exp(-d_ij / tau) / (sum of all exp(-d / tau))

and with these held fixed, sum_i <dL/dz_i, z_i> has the gradient of L, and is a sum over images. So any ranks and
micro-batches compute the same step, if all outputs are known before the first backward pass (Gao et al., arXiv
2101.06983). The model does not know.
"""

# B = images of the global batch, M = numbers of a block's output for an image

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from dit.devices import exact_float32
from dit.models.build import build
from dit.models.config import ModelConfig
from dit.ranks import Ranks
from dit.training.per_block import blocks
from storage.config import Config
from storage.errors import InputError


class Pulls(NamedTuple):
    """What the term does to a block's outputs for one batch."""

    of_parts: list[Tensor]
    """The gradient of the weighted term by the outputs for each micro-batch of this rank, times the number of ranks,
    over which gradients are averaged."""
    term: Tensor
    """L, in float64."""


class Dispersive(Config):
    """A term of the loss that pushes apart what a block makes of a batch's images (Wang & He, arXiv 2506.09027)."""

    block: int = Field(ge=1)
    """Number of the block, from 1, such as the last one of the first quarter."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of the term. It is logged without its weight, as ``dispersive``, and is no part of ``loss``."""
    tau: float = Field(default=1.0, gt=0)
    """Temperature: images whose outputs differ by so much, in the mean over the squares, count 1/e."""

    def pulls(self, parts: Sequence[Tensor], ranks: Ranks) -> Pulls:
        """What the term does to a block's outputs (b, ...) for this rank's micro-batches. All ranks call this."""
        mine = torch.cat([part.detach().flatten(1).float() for part in parts])
        z = torch.cat(_of_all_ranks(mine, ranks))
        z = z - z.mean(0)  # changes no difference, but leaves more digits to it
        count, numbers = z.shape
        rows = slice(ranks.rank * len(mine), (ranks.rank + 1) * len(mine))
        with exact_float32():
            products = z @ z.T
            squares = products.diagonal()
            distances = (squares[:, None] + squares - 2 * products).clamp_min(0) / numbers
            logits = (-distances / self.tau).fill_diagonal_(0)
            p = logits.flatten().softmax(0).view(count, count)[rows]
            apart = p.sum(1, keepdim=True) * z[rows] - p @ z
        pulls = -4 * self.weight * ranks.world_size / (self.tau * numbers) * apart
        of_parts = [pull.view_as(part) for pull, part in zip(pulls.split([*map(len, parts)]), parts, strict=True)]
        return Pulls(of_parts, logits.double().logsumexp((0, 1)) - 2 * math.log(count))

    def output(self, config: ModelConfig, prepare: Callable[[nn.Module], None] = lambda _: None) -> Tensor:
        """What the block returns for an image, on torch's "meta" device.

        Args:
            config: the model.
            prepare: applied to it first; it may choose what is trained.

        Raises:
            InputError: the model has no such block.
        """
        with torch.device("meta"):
            model = build(config)
            prepare(model)
            if self.block > (count := len(blocks(model))):
                raise InputError(f"train.dispersive.block: {self.block} is beyond the {count} blocks of the model")
            x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
            y = torch.empty(1, dtype=torch.long) if config.num_classes else None
            with outputs(model, self) as found:
                model(x, torch.empty(1), y)
        return found[0]

    def memory(self, config: ModelConfig, batch_size: int) -> int:
        """Bytes that the outputs for a global batch take on each rank: this rank's, all ranks', and those centred."""
        return 3 * 4 * batch_size * self.output(config).numel()


@contextmanager
def outputs(model: nn.Module, term: Dispersive | None) -> Iterator[list[Tensor]]:
    """What the term's block returns within the context; nothing without a term."""
    found: list[Tensor] = []
    if term is None:
        yield found
        return
    hook = blocks(model)[term.block - 1].register_forward_hook(lambda _module, _given, out: found.append(out))
    try:
        yield found
    finally:
        hook.remove()


def _of_all_ranks(mine: Tensor, ranks: Ranks) -> list[Tensor]:
    if ranks.world_size == 1:
        return [mine]
    every = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(every, mine)
    return every
