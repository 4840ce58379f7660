"""Precision and recall of samples (Kynkäänniemi et al., arXiv 1904.06991), as ADM's evaluation suite computes them."""

# N = reference images, M = samples, D = features, R = rows and K = columns of a block

from typing import Literal

import torch
from torch import Tensor

from dit.devices import exact_float32
from storage.errors import InputError

Mode = Literal["adm-fp16", "fp32"]
"""Precision of the distances. The papers' numbers are ``adm-fp16``."""
NEIGHBOUR = 3
"""A ball reaches to this neighbour of its centre."""
BLOCK = 10_000
"""Rows and columns of a block of distances in ADM's suite; with ``adm-fp16`` it is a part of the result."""


def precision_recall(reference: Tensor, samples: Tensor, mode: Mode, block: int = BLOCK) -> tuple[float, float]:
    """The share of samples within the reference's manifold, and the other way round.

    A set's manifold is the union of balls around its features that reach to the third neighbour,
    the surface included. Distances are squared. With ``adm-fp16`` they are float16; a block of them
    with an overflow is computed again in float32.

    Args:
        reference: features (N, D).
        samples: features (M, D) on the same device.
        mode: the precision of the distances.
        block: rows and columns of a block: 1 GiB beside the features with the default.

    Raises:
        InputError: one of the sets has fewer than four features.
    """
    if min(len(reference), len(samples)) <= NEIGHBOUR:
        raise InputError(
            f"precision and recall: {len(reference)} reference images and {len(samples)} samples; "
            f"at least {NEIGHBOUR + 1} of each are needed"
        )
    with exact_float32():
        around_reference, around_samples = _radii(reference, mode, block), _radii(samples, mode, block)
        precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
        for rows in _blocks(reference, block):
            for columns in _blocks(samples, block):
                distances = _distances(reference[rows], samples[columns], mode)
                precise[columns] |= (distances <= around_reference[rows, None]).any(0)
                recalled[rows] |= (distances <= around_samples[None, columns]).any(1)
    return float(precise.double().mean()), float(recalled.double().mean())


def _radii(features: Tensor, mode: Mode, block: int) -> Tensor:
    """Squared distances float32 (N,) to the third neighbour; the nearest of all is the feature itself."""
    return torch.cat([_radius(features[rows], features, mode, block) for rows in _blocks(features, block)])


def _radius(centres: Tensor, features: Tensor, mode: Mode, block: int) -> Tensor:
    nearest = torch.empty(len(centres), 0, device=centres.device)
    for columns in _blocks(features, block):
        distances = _distances(centres, features[columns], mode)
        count = min(NEIGHBOUR + 1, distances.shape[1])
        nearest = torch.cat([nearest, distances.topk(count, largest=False).values], 1)
        nearest = nearest.sort(1).values[:, : NEIGHBOUR + 1]
    return nearest[:, NEIGHBOUR]


def _blocks(features: Tensor, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, len(features), block)]


def _distances(u: Tensor, v: Tensor, mode: Mode) -> Tensor:
    """Squared distances float32 (R, K) of features (R, D) and (K, D), never negative."""
    if mode == "adm-fp16":
        distances = _squared(u, v, torch.float16)
        if distances.isfinite().all():
            return distances.clamp_(min=0).float()
        del distances
    return _squared(u, v, torch.float32).clamp_(min=0)


def _squared(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """|u|^2 - 2 u v + |v|^2, every step rounded to the dtype and every sum taken in float32, as on tensor cores."""
    u, v = u.to(dtype).float(), v.to(dtype).float()
    products = (u @ v.T).to(dtype)
    return products.mul_(-2).add_(_norms(u, dtype)[:, None]).add_(_norms(v, dtype)[None])


def _norms(u: Tensor, dtype: torch.dtype) -> Tensor:
    return u.square().to(dtype).float().sum(1).to(dtype)
