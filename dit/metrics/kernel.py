"""Kernel distance (KID in Inception's space: Bińkowski et al., arXiv 1801.01401): squared maximum mean discrepancy.

For a kernel k the discrepancy of two distributions is

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)    with k(x, y) = (x.y / D + 1)^3

With this cubic kernel it is 0 if and only if all moments up to the third agree. Leaving out the pairs of a feature
with itself makes the estimate unbiased, at any number of images; unlike a Fréchet distance it does not fall as N grows:

    sum_{i != j} k(x_i, x_j) / (N (N - 1)) + sum_{i != j} k(y_i, y_j) / (M (M - 1)) - 2 sum_ij k(x_i, y_j) / (N M)
"""

# N, M = features of either set, D = their dimensions

import torch
from torch import Tensor

from storage.errors import InputError

BLOCK = 4096


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate for features (N, D) and (M, D), in float64. It can be negative.

    All pairs are used, where the paper averages over many small subsets: the expectation is the same, and
    the variance smaller.

    Raises:
        InputError: one of the sets has fewer than two features.

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> kernel_distance(x, x + 1) > 0
        True
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise InputError(f"kernel distance: needs at least 2 images of each set, not {n} and {m}")
    within_sets = (_sum(x, x) - _self(x)) / (n * (n - 1)) + (_sum(y, y) - _self(y)) / (m * (m - 1))
    return within_sets - 2 * _sum(x, y) / (n * m)


def _sum(x: Tensor, y: Tensor) -> float:
    """Sum of the kernel over all pairs."""
    parts = (_kernel(a.double() @ b.double().T, x.shape[1]) for a in x.split(BLOCK) for b in y.split(BLOCK))
    return float(torch.stack([part.sum() for part in parts]).sum())


def _self(x: Tensor) -> float:
    """Sum of the kernel of each feature with itself."""
    return float(_kernel(x.double().square().sum(1), x.shape[1]).sum())


def _kernel(products: Tensor, dims: int) -> Tensor:
    """The kernel in the place of the products, which are many."""
    return products.div_(dims).add_(1).pow_(3)
