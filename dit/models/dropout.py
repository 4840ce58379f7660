"""Dropout without a random generator: what is dropped is a function of a key that comes with each sample."""

# B = batch

import torch
from torch import Tensor


def keyed_dropout(x: Tensor, keys: Tensor | None, site: int, probability: float) -> Tensor:
    """Set numbers to zero with a probability and scale up the others (Srivastava et al., JMLR 2014).

    The mask is a hash of the sample's key, the site and the position in the sample. So it is the same in any
    batch, on any rank and device.

    Args:
        x: samples (B, ...), of less than 2**31 numbers each.
        keys: random words (B,), int64; None leaves the samples as they are.
        site: number of this dropout in the model.
        probability: in [0, 1).
    """
    if keys is None or probability == 0:
        return x
    key = _mixed(keys ^ site)
    low, high = key.int()[:, None], (key >> 32).int()[:, None]
    z = (torch.arange(x[0].numel(), dtype=torch.int32, device=x.device) ^ low) * 0x7FEB352D
    z = ((z ^ _shifted(z, 16)) + high) * (0x846CA68B - 2**32)
    z = (z ^ _shifted(z, 15)) * (0x9E3779B1 - 2**32)
    keep = _shifted(z, 1) >= min(round(probability * 2**31), 2**31 - 1)
    return torch.where(keep.view_as(x), x / (1 - probability), 0)


def _mixed(key: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), on signed words."""
    key = (key ^ _shifted(key, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    key = (key ^ _shifted(key, 27)) * (0x94D049BB133111EB - 2**64)
    return key ^ _shifted(key, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: zeros come in, as for unsigned words."""
    return (words >> bits) & ((1 << (8 * words.itemsize - bits)) - 1)
