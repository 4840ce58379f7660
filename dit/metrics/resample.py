"""How a Fréchet distance depends on the samples drawn: its bias and its standard error.

Bias. A covariance estimated from N samples makes the distance too large, by about c / N (Chong & Forsyth, arXiv
1911.07023, section 4). So the distance is taken of subsets of several sizes N, and a straight line is fitted to it
against 1/N; at 1/N = 0 the line gives the distance at infinitely many samples.

Standard error. The bootstrap (Efron 1979) draws N of the N samples with replacement, many times, and takes the
distance of each. The standard deviation of these is that of the distance itself. Their percentiles would not do as
an interval: a resample repeats samples, which adds the bias of few samples once more; the deviation is free of it.
"""

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
"""Number of subsets from which a distance is extrapolated, each of another size."""
DRAWS = 32
"""Bootstrap resamples for a standard error."""
_BATCH = 8192


def subset(seed: int, stream: Stream, step: int, count: int, size: int) -> NDArray[np.int64]:
    """A random subset (size,) of 0 .. count - 1 in ascending order; all of them if size is larger."""
    order = np.argsort(words(seed, stream, step, [0], count)[0], kind="stable")
    return np.sort(order[:size])


def fd_infinity(reference: Statistics, features: Tensor, seed: int) -> float:
    """Fréchet distance at infinitely many samples.

    The 15 sizes are evenly spaced up to N, from N/10 as in the paper. With few samples they begin at 2 D, but at
    most at N/2, since the line bends where a covariance has not full rank. The bias of the reference remains.

    Args:
        reference: statistics of the reference's features.
        features: of the samples, float32 (N, D).
        seed: seed of the subsets.

    Raises:
        InputError: there are fewer than four samples.
    """
    count, dims = features.shape
    if count < 4:
        raise InputError(f"distance at infinitely many samples: needs at least 4 samples, not {count}")
    sizes = np.linspace(max(count // 10, min(2 * dims, count // 2)), count, POINTS).round().astype(int)
    chosen = [subset(seed, Stream.FD_SUBSET, point, count, size) for point, size in enumerate(sizes.tolist())]
    distances = [reference.distance(_statistics(features, rows)) for rows in chosen]
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def fd_standard_error(reference: Statistics, features: Tensor, seed: int, draws: int = DRAWS) -> float:
    """Standard error of a Fréchet distance over bootstrap resamples of the samples. The reference is held fixed.

    Args:
        reference: statistics of the reference's features.
        features: of the samples, float32 (N, D).
        seed: seed of the resamples.
        draws: number of resamples.

    Raises:
        InputError: there are fewer than two samples.
    """
    count = len(features)
    rows = ((uniforms(seed, Stream.BOOTSTRAP, draw, [0], count)[0] * count).astype(np.int64) for draw in range(draws))
    return float(np.std([reference.distance(_statistics(features, chosen)) for chosen in rows], ddof=1))


def _statistics(features: Tensor, rows: NDArray[np.int64]) -> Statistics:
    parts = torch.from_numpy(rows).to(features.device).split(_BATCH)
    return reduce(lambda total, part: total.update(features[part]), parts, Statistics.empty(features.shape[1]))
