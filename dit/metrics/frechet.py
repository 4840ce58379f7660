"""Fréchet distance between two sets of images in a feature space (FID in Inception's: Heusel et al., arXiv 1706.08500).

A Gaussian is fitted to the features of each set. The distance is the squared 2-Wasserstein distance of the two:

    |mean1 - mean2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

The root needs no root of a matrix. With S1 = L L', S1 S2 = L (L' S2) has the eigenvalues of (L' S2) L, which is
symmetric, so tr (S1 S2)^(1/2) is the sum of the square roots of its eigenvalues: real, and much faster.

Statistics of a stream of batches are the count n, the mean, and M2, the sum of (x - mean)(x - mean)'. Two parts a and
b, with means d apart, merge to M2 = M2_a + M2_b + d d' n_a n_b / n (Chan, Golub & LeVeque 1983); S = M2 / (n - 1).
"""

# N = samples, D = features

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from storage.errors import InputError


@dataclass(frozen=True, eq=False)
class Statistics:
    """Count, mean (D,) and M2 (D, D) of features, in float64.

    The result does not depend on how the stream is split into batches and ranks, up to rounding. The same
    order of merging gives the same bits.

    Examples:
        >>> features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> one, other = Statistics.of(features), Statistics.of(features + torch.tensor([3.0, 4.0]))
        >>> round(one.distance(other), 6)  # |(3, 4)|^2
        25.0
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, dims: int) -> Self:
        """Statistics of no samples."""
        return cls(0, torch.zeros(dims, dtype=torch.float64), torch.zeros(dims, dims, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Statistics of features (N, D); N may be 0.

        Raises:
            InputError: a feature is not finite.
        """
        x = features.detach().double()
        if not x.isfinite().all():
            raise InputError("features: some are not finite; check the samples and the extractor's weights")
        if not len(x):
            return cls.empty(x.shape[1])
        mean = x.mean(0)
        return cls(len(x), mean.cpu(), ((x - mean).T @ (x - mean)).cpu())

    def merge(self, other: Self) -> Self:
        """Statistics of both sets together."""
        count = self.count + other.count
        if not count:
            return self
        gap, share = other.mean - self.mean, other.count / count
        m2 = self.m2 + other.m2 + gap.outer(gap) * (self.count * share)
        return type(self)(count, self.mean + gap * share, m2)

    def update(self, features: Tensor) -> Self:
        """Statistics of these samples and of features (N, D) together."""
        return self.merge(self.of(features))

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D).

        Raises:
            InputError: there are fewer than two samples.
        """
        if self.count < 2:
            raise InputError(f"statistics: a covariance needs at least 2 samples, not {self.count}")
        return self.m2 / (self.count - 1)

    def distance(self, other: Self) -> float:
        """Fréchet distance to other features."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|mean1 - mean2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means (D,) and covariances S1, S2 (D, D).

    Raises:
        InputError: the dimensions differ.
    """
    if mean1.shape != mean2.shape:
        raise InputError(f"Fréchet distance: the features have different dimensions, {len(mean1)} and {len(mean2)}")
    s1, s2, gap = covariance1.double(), covariance2.double(), mean1.double() - mean2.double()
    factor = _factor(s1)
    roots = torch.linalg.eigvalsh(factor.T @ s2 @ factor).clamp(min=0).sqrt()
    return float(gap @ gap + s1.trace() + s2.trace() - 2 * roots.sum())


def _factor(s: Tensor) -> Tensor:
    """L with L L' = s; by eigenvectors where a covariance of low rank has no Cholesky factor."""
    lower: Tensor
    lower, fault = torch.linalg.cholesky_ex(s)
    if not fault:
        return lower
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(s)
    return vectors * values.clamp(min=0).sqrt()
