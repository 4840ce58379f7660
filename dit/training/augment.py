"""EDM's non-leaking augmentation (Karras et al., arXiv 2206.00364, appendix F.2).

An image x is distorted to T_a x, where nine numbers a say how, and the network is given a as a further
condition. So it learns the distributions p(T_a x | a) of distorted images, one for each a. Sampling asks for
a = 0, where T_0 is the identity: samples are undistorted, however strong the augmentation was.

T_a flips, then moves every point z of the plane (from the image's centre) to A z + b:

    A = S(k, phi) R(theta) s         s = 2^(0.2 n1), theta uniform, k = 2^(0.2 n2), b = size / 8 * (n3, n4)
    S(k, phi) = R(phi) diag(k, 1/k) R(-phi)    a stretch by k along the direction phi

with standard normal n1 .. n4. The direction phi is uniform in half of the stretches, and the x-axis in the others.
Each is applied with probability p, independently of the others. Pixels are read at the inverse, A^-1 (z - b); its
closed form is in `_inverse`.
"""

# B = batch, C = channels, H, W = height and width; x points right and y down, from the centre, in pixels

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DRAWS = 14
"""Uniform numbers per image: two for the flips, two angles, four made normal, five that switch transformations, and one
that turns the stretch."""
TURNED = 0.5
"""Share of the stretches that are along a random direction instead of the x-axis."""
DEVIATION = 0.2
"""Standard deviation of the binary logarithm of both scalings."""
SHIFT_DEVIATION = 0.125
"""Standard deviation of the translation along an axis, in units of the image's size."""
LOBES = 3
"""Of the Lanczos filter: it reaches three zero crossings to either side."""


def augmented(x0: Tensor, u: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Images flipped, scaled, rotated, stretched and shifted, in this order, each independently of the others.

    The x-flip has probability 1/2, the other transformations p. With p = 0 nothing is done, the x-flip
    included. An image that is only flipped, or not transformed, keeps its values to the bit.

    Args:
        x0: float32 images (B, C, H, W).
        u: numbers (B, DRAWS), uniform in [0, 1), float64.
        p: probability of each transformation but the x-flip.

    Returns:
        The images, in which interpolation may overshoot the range of x0, and float32 labels (B, 9):
        x-flip and y-flip as 0 or 1; the logarithm of the scale; cos - 1 and sin of the rotation; the
        logarithm of the stretch times cos and sin of its direction; the shifts along x and y.
        Logarithms and shifts are in units of their standard deviation. A transformation that is not
        applied has label 0.
    """
    on = u[:, 8:13] < p  # (B, 5): y-flip, scale, rotation, stretch, shift
    x_flip, y_flip = (u[:, 0] < 0.5) & (p > 0), (u[:, 1] < 0.5) & on[:, 0]
    rotation, direction = (math.pi * (2 * u[:, 2:4] - 1)).unbind(1)
    direction = direction * (u[:, 13] < TURNED)
    scale, stretch, right, down = torch.special.ndtri(u[:, 4:8].clamp(min=2.0**-54)).unbind(1)
    scale, rotation, stretch = scale * on[:, 1], rotation * on[:, 2], stretch * on[:, 3]
    shift = torch.stack([right, down], 1) * on[:, 4:]
    turn = [rotation.cos() - 1, rotation.sin(), stretch * direction.cos(), stretch * direction.sin()]
    labels = torch.stack([x_flip, y_flip, scale, *turn, *shift.unbind(1)], 1)

    x = torch.where(_per_image(x_flip, x0), x0.flip(3), x0)
    x = torch.where(_per_image(y_flip, x0), x.flip(2), x)
    size = shift.new_tensor([x0.shape[3], x0.shape[2]])
    moved = resampled(x, _inverse(scale, rotation, stretch, direction), SHIFT_DEVIATION * size * shift)
    return torch.where(_per_image(on[:, 1:].any(1), x0), moved, x), labels.to(x0)


def resampled(x: Tensor, inverse: Tensor, shift: Tensor) -> Tensor:
    """Images (B, C, H, W) that show at z what ``x`` shows at ``inverse`` (B, 2, 2) times (z - ``shift`` (B, 2)).

    The image, mirrored at its edges, is read at twice the density by cubic interpolation, and reduced by a
    Lanczos filter of three lobes. Every pixel is computed by itself and in a fixed order, so an image does
    not depend on its batch.
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
    """A^-1 = s^-1 R(-theta) S(1/k, phi), (B, 2, 2), in closed form.

    S(1/k, phi) = cosh(ln k) I - sinh(ln k) Q(2 phi) with the reflection Q(a) = [[cos a, sin a], [sin a, -cos a]],
    and R(-theta) Q(2 phi) = Q(2 phi - theta).
    """
    shrink, log_stretch = torch.exp2(-DEVIATION * scale), math.log(2) * DEVIATION * stretch
    even, odd = shrink * log_stretch.cosh(), shrink * log_stretch.sinh()
    cos, sin = even * rotation.cos(), even * rotation.sin()
    keep, swap = odd * (2 * direction - rotation).cos(), odd * (2 * direction - rotation).sin()
    entries = torch.stack([cos - keep, sin - swap, -sin - swap, cos + keep], 1)
    return entries.reshape(-1, 2, 2)


def _half_pixels(size: int) -> Tensor:
    """Centres of the half-pixels of a line, from its middle, and of those past its ends that the filter reaches."""
    margin = 2 * LOBES - 1
    return (torch.arange(-margin, 2 * size + margin) + 0.5 - size) / 2


def _halved(x: Tensor) -> Tensor:
    """Half-pixels along the last axis to pixels. Not by a convolution, whose order of sums depends on the batch."""
    distance = np.arange(0.5 - 2 * LOBES, 2 * LOBES) / 2
    taps = np.sinc(distance) * np.sinc(distance / LOBES)
    last = x.shape[-1] - len(taps)
    parts = [x[..., i : last + i + 1 : 2] * float(tap) for i, tap in enumerate(taps / taps.sum())]
    return sum(parts[1:], parts[0])


def _per_image(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (B,) as (B, 1, 1, 1), on the device of x."""
    return mask.to(x.device).reshape(-1, 1, 1, 1)
