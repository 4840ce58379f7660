"""EDM's augmentation of images, and what the network is told of it (Karras et al., arXiv 2206.00364, appendix F.2).

An image is moved, and nine numbers say how; a network that is given them learns the distribution of
augmented images for each, and sampling asks it for the nine zeros: images as they are. So nothing of
the augmentation leaks into samples.
"""

# B = batch, C = channels, H, W = height and width; x points right and y down, from the centre, in pixels

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DRAWS = 13
"""Uniform numbers an image needs: two coins, two angles, four normals, and five that say what is done at all."""
DEVIATION = 0.2
"""Standard deviation of the binary logarithm of both scalings."""
SHIFT_DEVIATION = 0.125
"""Standard deviation of the translation along an axis, in units of the image's size."""
LOBES = 3


def augmented(x0: Tensor, u: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Images flipped, scaled, rotated, stretched and shifted, in this order, each independently of the others.

    Every image has an even chance of the x-flip; the other transformations are done with
    probability p. With p = 0 nothing is done at all, the x-flip included. An image that is only
    flipped, or left alone, keeps its values to the bit.

    Args:
        x0: float32 images (B, C, H, W).
        u: numbers (B, DRAWS), uniform in [0, 1), float64.
        p: probability of each transformation but the x-flip.

    Returns:
        The images, in which interpolation may overshoot the range of x0, and float32 labels (B, 9):
        x-flip and y-flip as 0 or 1; the logarithm of the scale; cos - 1 and sin of the rotation; the
        logarithm of the stretch times cos and sin of its direction; the shifts along x and y.
        Logarithms and shifts are in units of their standard deviation, and what is not done is 0.
    """
    on = u[:, 8:] < p
    x_flip, y_flip = (u[:, 0] < 0.5) & (p > 0), (u[:, 1] < 0.5) & on[:, 0]
    rotation, direction = (math.pi * (2 * u[:, 2:4] - 1)).unbind(1)
    scale, stretch, right, down = torch.special.ndtri(u[:, 4:8].clamp(min=2.0**-54)).unbind(1)
    scale, rotation, stretch = scale * on[:, 1], rotation * on[:, 2], stretch * on[:, 3]
    shift = torch.stack([right, down], 1) * on[:, 4:]
    turn = [rotation.cos() - 1, rotation.sin(), stretch * direction.cos(), stretch * direction.sin()]
    labels = torch.stack([x_flip, y_flip, scale, *turn, *shift.unbind(1)], 1)

    x = torch.where(_each(x_flip, x0), x0.flip(3), x0)
    x = torch.where(_each(y_flip, x0), x.flip(2), x)
    size = shift.new_tensor([x0.shape[3], x0.shape[2]])
    moved = resampled(x, _inverse(scale, rotation, stretch, direction), SHIFT_DEVIATION * size * shift)
    return torch.where(_each(on[:, 1:].any(1), x0), moved, x), labels.to(x0)


def resampled(x: Tensor, inverse: Tensor, shift: Tensor) -> Tensor:
    """Images (B, C, H, W) whose place z shows what was at ``inverse`` (B, 2, 2) times z - ``shift`` (B, 2).

    Read at twice the density by cubic interpolation, with the image mirrored at its edges, and brought
    down by a Lanczos filter of three lobes. Every pixel is computed by itself and in a fixed order, so
    an image does not depend on its batch.
    """
    height, width = x.shape[2:]
    matrix, (right, down) = inverse.to(x)[..., None, None], shift.to(x)[..., None, None].unbind(1)
    across = _half_pixels(width).to(x) - right
    along = _half_pixels(height).to(x)[:, None] - down
    columns, rows = (matrix[:, i, 0] * across + matrix[:, i, 1] * along for i in (0, 1))
    grid = torch.stack([columns * (2 / width), rows * (2 / height)], 3)
    dense = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return _halved(_halved(dense).transpose(2, 3)).transpose(2, 3)


def _inverse(scale: Tensor, rotation: Tensor, stretch: Tensor, direction: Tensor) -> Tensor:
    """From where a pixel comes, (B, 2, 2): the inverse of scaling, then rotating, then stretching.

    A stretch by k along a direction narrows by k across it, and is cosh(ln k) times the identity plus
    sinh(ln k) times the reflection that keeps the direction. A rotation turns one reflection into another.
    """
    shrink, log_stretch = torch.exp2(-DEVIATION * scale), math.log(2) * DEVIATION * stretch
    even, odd = shrink * log_stretch.cosh(), shrink * log_stretch.sinh()
    cos, sin = even * rotation.cos(), even * rotation.sin()
    keep, swap = odd * (2 * direction - rotation).cos(), odd * (2 * direction - rotation).sin()
    entries = torch.stack([cos - keep, sin - swap, -sin - swap, cos + keep], 1)
    return entries.reshape(-1, 2, 2)


def _half_pixels(size: int) -> Tensor:
    """Centres of the half-pixels of a line and of those beyond its ends that the filter reaches, from its centre."""
    margin = 2 * LOBES - 1
    return (torch.arange(-margin, 2 * size + margin) + 0.5 - size) / 2


def _halved(x: Tensor) -> Tensor:
    """Half-pixels along the last axis to pixels. A sum, not a convolution, whose order depends on the batch."""
    distance = np.arange(0.5 - 2 * LOBES, 2 * LOBES) / 2
    taps = np.sinc(distance) * np.sinc(distance / LOBES)
    last = x.shape[-1] - len(taps)
    parts = [x[..., i : last + i + 1 : 2] * float(tap) for i, tap in enumerate(taps / taps.sum())]
    return sum(parts[1:], parts[0])


def _each(choice: Tensor, x: Tensor) -> Tensor:
    """Choices (B,) as (B, 1, 1, 1), on the device of x."""
    return choice.to(x.device).reshape(-1, 1, 1, 1)
