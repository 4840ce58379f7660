"""Images as bytes, and as the numbers that networks take."""

# B = batch, H, W = height and width

import torch
from torch import Tensor


def to_unit(images: Tensor) -> Tensor:
    """Images uint8 (B, H, W, 3) as float32 (B, 3, H, W) in -1 .. 1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in -1 .. 1 as uint8 (B, H, W, 3): 127.5 x + 128 clamped to 0..255 and truncated, as DiT's."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
