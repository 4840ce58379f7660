"""Devices and precisions."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arithmetic = Literal["float32", "tf32", "bfloat16"]
"""On a GPU tf32 rounds the factors of matrix products to 10 bits, which is faster."""


def device() -> torch.device:
    """The GPU of this rank if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def sent(values: NDArray[np.generic], device: torch.device | str) -> Tensor:
    """An array as a tensor on a device; to a GPU through pinned memory, without waiting for the copy."""
    tensor: Tensor = torch.from_numpy(values)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def dtype(precision: Arithmetic) -> torch.dtype:
    """The torch dtype of a precision."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def arithmetic(precision: Arithmetic) -> AbstractContextManager[None]:
    """Within it products of float32 use TF32 if that is the precision, and else do not."""
    return _products(tf32=precision == "tf32")


def exact_float32() -> AbstractContextManager[None]:
    """Within it no product of float32 uses TF32, as cuDNN does by default."""
    return _products(tf32=False)


@contextmanager
def _products(*, tf32: bool) -> Iterator[None]:
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
