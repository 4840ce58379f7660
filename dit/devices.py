"""Where the tensors go."""

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def device() -> torch.device:
    """The GPU of this rank when there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def dtype(precision: Precision) -> torch.dtype:
    """The torch type of a precision."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
