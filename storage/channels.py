"""Mean and standard deviation of each latent channel of a store, from sums that each of its blocks commits.

A latent that training draws is mean + deviation * noise, of variance Var(mean) + E[deviation^2]. All sums are over the
numbers as they are stored, in float64, and the blocks are added up in their order. So the statistics have the same bits
whatever ranks, kills and restarts there were.
"""

# N = images of a block, F = flips, C = channels, h, w = sides of a latent

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage import records
from storage.config import Config
from storage.manifest import StageOutput
from storage.parallel import threads

FOLDER = "statistics"
"""Folder of the blocks' sums, below the stage's folder. The manifest lists none of them."""


class ChannelScale(Config):
    """The mean and the standard deviation of each channel of latents."""

    mean: tuple[float, ...]
    """(C,)"""
    deviation: tuple[float, ...]
    """(C,)"""


PLANNED: Final = ChannelScale(mean=(), deviation=())
"""Stands for the statistics of a store that is only planned."""


class BlockSums(records.Record):
    """The sums of one block, over its images and positions, for each flip and channel (F, C)."""

    count: int
    """Numbers in each sum."""
    mean: tuple[tuple[float, ...], ...]
    """Of the means."""
    squares: tuple[tuple[float, ...], ...]
    """Of the squares of means and deviations."""


def commit_sums(out: StageOutput, block: int, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write the sums of a block. Call this before the block is committed: a block that is done has its sums.

    Args:
        out: the stage's output.
        block: number of the block.
        arrays: its ``mean`` and ``std`` (N, F, C, h, w).

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    rows, flips, channels, height, width = arrays["mean"].shape
    sums = np.zeros((2, flips, channels))
    for place in np.ndindex(flips, channels):
        mean, std = (arrays[name][:, *place].astype(np.float64) for name in ("mean", "std"))
        sums[0, *place] = mean.sum()
        sums[1, *place] = np.square(mean).sum() + np.square(std).sum()
    mean_sums, squares = sums.tolist()
    record = BlockSums(files=(), count=rows * height * width, mean=mean_sums, squares=squares)
    records.commit(out, _record(block), record, replace=True)


def statistics(out: StageOutput, blocks: int) -> tuple[ChannelScale, ...] | None:
    """The statistics of a store for each flip; None if a block has no sums, as those of earlier versions.

    Raises:
        StorageError: sums exist and cannot be read.
    """
    with threads(16) as pool:
        found = list(pool.map(lambda block: records.load(out, _record(block), BlockSums), range(blocks)))
    known = [sums for sums in found if sums]
    if len(known) < blocks:
        return None
    count = sum(sums.count for sums in known)
    return tuple(
        _scale([sums.mean[flip] for sums in known], [sums.squares[flip] for sums in known], count)
        for flip in range(len(known[0].mean))
    )


def combined(views: tuple[ChannelScale, ...]) -> ChannelScale:
    """The statistics of several views of the same images, each drawn as often as the others."""
    means = np.array([view.mean for view in views])
    variances = np.square([view.deviation for view in views])
    deviations = np.sqrt(variances.mean(0) + np.square(means - means.mean(0)).mean(0))
    return ChannelScale(mean=tuple(means.mean(0).tolist()), deviation=tuple(deviations.tolist()))


def _scale(means: list[tuple[float, ...]], squares: list[tuple[float, ...]], count: int) -> ChannelScale:
    """From the sums of each block, by channel."""
    mean = [math.fsum(blocks) / count for blocks in zip(*means, strict=True)]
    second = [math.fsum(blocks) / count for blocks in zip(*squares, strict=True)]
    deviation = [math.sqrt(max(above - m**2, 0.0)) for above, m in zip(second, mean, strict=True)]
    return ChannelScale(mean=tuple(mean), deviation=tuple(deviation))


def _record(block: int) -> str:
    return f"{FOLDER}/rows-{block:05d}.json"
