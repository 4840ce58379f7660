"""Kernel distance: maximum mean discrepancy with a cubic kernel (Bińkowski et al., arXiv 1801.01401)."""

# N, M = features of either set, D = their dimensions

import torch
from torch import Tensor

from storage.errors import InputError

BLOCK = 4096


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """The unbiased squared discrepancy (section 3) of features (N, D) and (M, D); KID in Inception's space.

    The kernel is (x y / D + 1)^3. All pairs are used, in float64, instead of many small subsets: the
    expectation is the same and the variance smaller. It may be below zero.

    Raises:
        InputError: one of the sets has fewer than two features.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise InputError(f"kernel distance: sets of {n} and {m} features; at least 2 of each are needed")
    within = (_sum(x, x) - _self(x)) / (n * (n - 1)) + (_sum(y, y) - _self(y)) / (m * (m - 1))
    return within - 2 * _sum(x, y) / (n * m)


def _sum(x: Tensor, y: Tensor) -> float:
    """The kernel summed over all pairs."""
    parts = (_kernel(a.double() @ b.double().T, x.shape[1]) for a in x.split(BLOCK) for b in y.split(BLOCK))
    return float(torch.stack([part.sum() for part in parts]).sum())


def _self(x: Tensor) -> float:
    """The kernel of every feature with itself, summed."""
    return float(_kernel(x.double().square().sum(1), x.shape[1]).sum())


def _kernel(products: Tensor, dims: int) -> Tensor:
    return (products / dims + 1) ** 3
