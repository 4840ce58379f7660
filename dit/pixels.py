"""Images as bytes, and as the numbers that networks take."""

# B = batch, H, W = height and width

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "down"]
"""How a number becomes one of the 256 levels."""


def to_unit(images: Tensor) -> Tensor:
    """Images uint8 (B, H, W, 3) as float32 (B, 3, H, W) in -1 .. 1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Images (B, 3, H, W) in -1 .. 1 as uint8 (B, H, W, 3), clamped to 0 .. 255.

    Args:
        images: the images.
        rounding: ``nearest`` truncates 127.5 x + 128, as DiT and EDM do; ``down`` truncates 127.5 (x + 1), as the
            published code of latent DiffiT does, which is half a level darker on average.
    """
    levels = 127.5 * images.float() + 128 if rounding == "nearest" else 127.5 * (images.float() + 1)
    return levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
