"""Where the tensors go."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def device() -> torch.device:
    """The GPU of this rank when there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def dtype(precision: Precision) -> torch.dtype:
    """The torch type of a precision."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it no product of float32 is rounded to TF32, which cuDNN does by default."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
