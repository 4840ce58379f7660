"""What the number of samples does to a Fréchet distance: its bias and its spread."""

# N = samples, D = features

from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit.metrics.frechet import Statistics
from dit.random import Stream, uniforms, words
from storage.errors import InputError

POINTS = 15
"""Sizes of subsets that a distance is extrapolated from."""
DRAWS = 32
"""Resampled sets that a spread is taken from."""
_BATCH = 8192


def subset(seed: int, stream: Stream, step: int, count: int, size: int) -> NDArray[np.int64]:
    """Ascending numbers (size,) out of 0 .. count - 1, each set of them equally likely; all, if size is larger."""
    order = np.argsort(words(seed, stream, step, [0], count)[0], kind="stable")
    return np.sort(order[:size])


def fd_infinity(reference: Statistics, features: Tensor, seed: int) -> float:
    """Fréchet distance at infinitely many samples (Chong & Forsyth, arXiv 1911.07023, section 4).

    The distance falls linearly in 1/N. A line through its values at 15 sizes, each with a subset
    of its own, is extended to 1/N = 0. Sizes run evenly up to N, from N/10 as in the paper; with few
    samples from 2 D, but at most N/2, since the line bends where a covariance is not of full rank.
    The reference's own bias stays.

    Args:
        reference: statistics of the reference's features.
        features: of the samples, float32 (N, D).
        seed: decides the subsets.

    Raises:
        InputError: there are fewer than four samples.
    """
    count, dims = features.shape
    if count < 4:
        raise InputError(f"distance at infinitely many samples: only {count} samples; at least 4 are needed")
    sizes = np.linspace(max(count // 10, min(2 * dims, count // 2)), count, POINTS).round().astype(int)
    chosen = [subset(seed, Stream.FD_SUBSET, point, count, size) for point, size in enumerate(sizes.tolist())]
    distances = [reference.distance(_statistics(features, rows)) for rows in chosen]
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def fd_spread(reference: Statistics, features: Tensor, seed: int, draws: int = DRAWS) -> float:
    """Standard error of a Fréchet distance: its deviation over bootstrap resamples of the samples' features.

    Percentiles of the resamples would not do: a resample repeats samples, which adds the bias of few
    samples once more. The deviation is free of it. The reference is held fixed.

    Args:
        reference: statistics of the reference's features.
        features: of the samples, float32 (N, D).
        seed: decides the resamples.
        draws: how many resamples.

    Raises:
        InputError: there are fewer than two samples.
    """
    count = len(features)
    rows = ((uniforms(seed, Stream.BOOTSTRAP, draw, [0], count)[0] * count).astype(np.int64) for draw in range(draws))
    return float(np.std([reference.distance(_statistics(features, chosen)) for chosen in rows], ddof=1))


def _statistics(features: Tensor, rows: NDArray[np.int64]) -> Statistics:
    parts = torch.from_numpy(rows).to(features.device).split(_BATCH)
    return reduce(lambda done, part: done.update(features[part]), parts, Statistics.empty(features.shape[1]))
