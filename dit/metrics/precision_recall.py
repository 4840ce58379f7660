"""Precision and recall of samples (Kynkäänniemi et al., arXiv 1904.06991), as ADM's evaluation suite computes them.

The manifold of a set is estimated by balls: one around each of its features, whose radius is the distance to the
k-th nearest neighbour in the set, k = 3 (equation 1). A feature lies in the manifold if it lies in any ball.

    precision = share of samples in the manifold of the reference: are they realistic?
    recall = share of the reference in the manifold of the samples: do they cover the data?    (equation 2)

Squared distances are compared, |u - v|^2 = |u|^2 - 2 u.v + |v|^2, so that a product of matrices gives a block of them.
In float16, as ADM's suite computes them, their rounding is a part of the published numbers.
"""

# N = reference images, M = samples, D = features, R = rows and K = columns of a block

from typing import Literal

import torch
from torch import Tensor

from dit.devices import exact_float32
from storage.errors import InputError

Mode = Literal["adm-fp16", "fp32"]
"""Precision of the distances. The papers' numbers are ``adm-fp16``."""
NEIGHBOUR = 3
"""k: a ball reaches to this neighbour of its centre."""
BLOCK = 10_000
"""Rows and columns of a block of distances in ADM's suite. With ``adm-fp16`` it changes the result."""

PIECE = 1_000
"""Rows of a block that are rounded at once, so that they take no memory beside it."""


def precision_recall(reference: Tensor, samples: Tensor, mode: Mode, block: int = BLOCK) -> tuple[float, float]:
    """Precision and recall, each in 0 .. 1. The surface of a ball belongs to it.

    With ``adm-fp16`` distances are float16, and a block that overflows is computed again in float32.

    Args:
        reference: features (N, D).
        samples: features (M, D) on the same device.
        mode: the precision of the distances.
        block: rows and columns of a block: half a GiB beside the features with the default.

    Raises:
        InputError: one of the sets has fewer than four features.

    Examples:
        >>> reference = torch.arange(8.0)[:, None]
        >>> precision_recall(reference, reference[:4], "fp32")  # no ball reaches the last one
        (1.0, 0.875)
    """
    if min(len(reference), len(samples)) <= NEIGHBOUR:
        raise InputError(
            f"precision and recall: at least {NEIGHBOUR + 1} reference images and samples are needed, not "
            f"{len(reference)} and {len(samples)}"
        )
    with exact_float32():
        reference_radii, sample_radii = _radii(reference, mode, block), _radii(samples, mode, block)
        in_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        in_samples = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
        for rows in _blocks(reference, block):
            for columns in _blocks(samples, block):
                distances = _distances(reference[rows], samples[columns], mode)
                in_reference[columns] |= (distances <= reference_radii[rows, None]).any(0)
                in_samples[rows] |= (distances <= sample_radii[None, columns]).any(1)
                del distances  # before the next block is made
    return float(in_reference.double().mean()), float(in_samples.double().mean())


def _radii(features: Tensor, mode: Mode, block: int) -> Tensor:
    """Squared radii float32 (N,): distances to the third neighbour. The nearest of all is the feature itself."""
    return torch.cat([_radius(features[rows], features, mode, block) for rows in _blocks(features, block)])


def _radius(centres: Tensor, features: Tensor, mode: Mode, block: int) -> Tensor:
    nearest = torch.empty(len(centres), 0, device=centres.device)
    for columns in _blocks(features, block):
        distances = _distances(centres, features[columns], mode)
        count = min(NEIGHBOUR + 1, distances.shape[1])
        nearest = torch.cat([nearest, distances.topk(count, largest=False).values], 1)
        nearest = nearest.sort(1).values[:, : NEIGHBOUR + 1]
        del distances  # before the next block is made
    return nearest[:, NEIGHBOUR]


def _blocks(features: Tensor, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, len(features), block)]


def _distances(u: Tensor, v: Tensor, mode: Mode) -> Tensor:
    """Squared distances float32 (R, K) of features (R, D) and (K, D), never negative."""
    if mode == "adm-fp16":
        distances = _squared(u, v, torch.float16)
        if torch.stack(distances.aminmax()).isfinite().all():
            return distances.clamp_(min=0)
        del distances
    return _squared(u, v, torch.float32).clamp_(min=0)


def _squared(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """|u|^2 - 2 u v + |v|^2 float32, every step rounded to the dtype and sums taken in float32, as on tensor cores."""
    u, v = u.to(dtype).float(), v.to(dtype).float()
    squared, of_u, of_v = u @ v.T, _norms(u, dtype), _norms(v, dtype)
    for rows in _blocks(squared, PIECE):
        squared[rows] = squared[rows].to(dtype).mul_(-2).add_(of_u[rows, None]).add_(of_v[None])
    return squared


def _norms(u: Tensor, dtype: torch.dtype) -> Tensor:
    return u.square().to(dtype).float().sum(1).to(dtype)
