"""Resizing as in TensorFlow 1, which FID is defined with, and as in Pillow, for FD-DINOv2."""

# B = batch, C = channels, H, W = image sides

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """Images float32 (B, C, H, W) in any range to (B, C, side, side), as TensorFlow 1's ResizeBilinear.

    Pixel i of the result lies at i * H / side of the source: no half-pixel offset, no aligned
    corners, no antialiasing, no rounding.
    """
    return _along(_along(images, side, 3), side, 2)


def resize_bicubic(images: Tensor, side: int) -> Tensor:
    """Images float32 (B, C, H, W) in whole levels 0..255 to (B, C, side, side), as Pillow's bicubic filter.

    Antialiased; across, then down, each rounded to a level.
    """
    for size in ((images.shape[2], side), (side, side)):
        images = F.interpolate(images, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return images


def _along(images: Tensor, side: int, dim: int) -> Tensor:
    length = images.shape[dim]
    scale = torch.tensor(length, dtype=torch.float32, device=images.device) / side
    source = torch.arange(side, dtype=torch.float32, device=images.device) * scale
    low = source.floor().long()
    a, b = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=length - 1))
    share = (source - low).view(-1, *[1] * (3 - dim))
    return a + (b - a) * share
