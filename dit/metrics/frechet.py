"""Fréchet distance between Gaussians fitted to features (Heusel et al., arXiv 1706.08500)."""

# N = samples, D = features

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from storage.errors import InputError


@dataclass(frozen=True, eq=False)
class Statistics:
    """Count, mean (D,) and sum of outer products of deviations (D, D) of features, in float64.

    Parts merge by Chan, Golub & LeVeque (1983), so batches and ranks may be cut anyhow. To get the
    same bits again, merge in the same order.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, dims: int) -> Self:
        """Of no samples."""
        return cls(0, torch.zeros(dims, dtype=torch.float64), torch.zeros(dims, dims, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features (N, D), which may be none.

        Raises:
            InputError: a feature is not finite.
        """
        x = features.detach().double()
        if not x.isfinite().all():
            raise InputError("features: some are not finite; look at the samples and the extractor's weights")
        if not len(x):
            return cls.empty(x.shape[1])
        mean = x.mean(0)
        return cls(len(x), mean.cpu(), ((x - mean).T @ (x - mean)).cpu())

    def merge(self, other: Self) -> Self:
        """Of both sets together."""
        count = self.count + other.count
        if not count:
            return self
        gap, share = other.mean - self.mean, other.count / count
        m2 = self.m2 + other.m2 + gap.outer(gap) * (self.count * share)
        return type(self)(count, self.mean + gap * share, m2)

    def update(self, features: Tensor) -> Self:
        """Of these samples and features (N, D) together."""
        return self.merge(self.of(features))

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D).

        Raises:
            InputError: there are fewer than two samples.
        """
        if self.count < 2:
            raise InputError(f"statistics: {self.count} samples have no covariance; at least 2 are needed")
        return self.m2 / (self.count - 1)

    def distance(self, other: Self) -> float:
        """Fréchet distance to other features."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|mean1 - mean2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means (D,) and covariances (D, D).

    With S1 = L L', the trace of the root is the sum of the square roots of the eigenvalues of
    L' S2 L, which is symmetric: much faster than the root of a matrix, and always real.

    Raises:
        InputError: the dimensions differ.
    """
    if mean1.shape != mean2.shape:
        raise InputError(f"Fréchet distance: features of {len(mean1)} and {len(mean2)} dimensions do not compare")
    s1, s2, gap = covariance1.double(), covariance2.double(), mean1.double() - mean2.double()
    factor = _factor(s1)
    roots = torch.linalg.eigvalsh(factor.T @ s2 @ factor).clamp(min=0).sqrt()
    return float(gap @ gap + s1.trace() + s2.trace() - 2 * roots.sum())


def _factor(s: Tensor) -> Tensor:
    """L with L L' = s, also for a covariance of low rank, which has no Cholesky factor."""
    lower: Tensor
    lower, fault = torch.linalg.cholesky_ex(s)
    if not fault:
        return lower
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(s)
    return vectors * values.clamp(min=0).sqrt()
