"""The attention of TMSA: a relative bias as a mask of scaled_dot_product_attention, and in FlexAttention."""

# B = windows, h = heads, N = tokens in a window, d = width of a head

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.common import Measured, Result, fastest, main
from dit.devices import device

Shape = tuple[int, int, int, int]
"""(B, h, N, d)."""
Parts = tuple[Tensor, Tensor, Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

SHAPES: dict[str, Shape] = {"xl2": (2, 16, 256, 72), "window64": (64, 8, 64, 32), "window16": (256, 8, 16, 32)}
"""Two images in the latent XL/2; one of 64 by 64 pixels in windows of 8 by 8, and in windows of 4 by 4."""
GPU_FACTOR = 32
"""On a GPU there are this many times the windows."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative difference from `masked`."""


def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Queries, keys and values (B, h, N, d) and a bias (h, N, N) to (B, h, N, d), as TMSA does it."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def masked_4d(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As `masked`, with a mask of four dimensions, which the CPU's fused kernel needs."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As `masked`, in FlexAttention."""

    def add(score: Tensor, _b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    out = flex_attention(q, k, v, score_mod=add)
    assert isinstance(out, Tensor)
    return out


KERNELS: dict[str, Attend] = {"mask": masked, "mask_4d": masked_4d, "flex": flex}


def measure() -> Measured:
    """Measure all kernels compiled, forward and forward with backward, at every shape."""
    results: list[Result] = []
    ratios: dict[str, float] = {}
    factor, dtype = (GPU_FACTOR, torch.bfloat16) if torch.cuda.is_available() else (1, torch.float32)
    for name, (windows, heads, tokens, width) in SHAPES.items():
        found, compared = compare((factor * windows, heads, tokens, width), dtype)
        results += [Result(f"{name}_{result.name}", result.value, result.unit) for result in found]
        ratios |= {f"{name}_{ratio}": value for ratio, value in compared.items()}
    return results, ratios


def compare(shape: Shape, dtype: torch.dtype) -> Measured:
    """Fastest times at a shape. On a CPU, where FlexAttention has no backward, that is left out.

    Raises:
        ValueError: the outputs of two kernels differ.
    """
    torch.compiler.reset()
    parts = inputs(shape, dtype)
    kernels: dict[str, Attend] = {name: torch.compile(kernel, dynamic=False) for name, kernel in KERNELS.items()}
    with torch.no_grad():
        expected = kernels["mask"](*parts).float()
        for name, kernel in kernels.items():
            gap = float((kernel(*parts).float() - expected).norm() / expected.norm())
            if not gap <= TOLERANCE[dtype]:
                raise ValueError(f"{name} is {gap:.2g} from the mask at {shape}")
        forward = {name: fastest(partial(kernel, *parts)) for name, kernel in kernels.items()}
    for part in parts:
        part.requires_grad_()
    trained = [name for name in kernels if name != "flex" or has_backward(parts)]
    both = {name: fastest(partial(_gradients, kernels[name], parts)) for name in trained}
    times = {f"{name}_forward": seconds for name, seconds in forward.items()}
    times |= {f"{name}_forward_backward": seconds for name, seconds in both.items()}
    ratios = {f"{name}_vs_mask_forward": forward["mask"] / forward[name] for name in list(forward)[1:]}
    ratios |= {f"{name}_vs_mask_forward_backward": both["mask"] / both[name] for name in list(both)[1:]}
    return [Result(name, 1000 * seconds, "ms") for name, seconds in times.items()], ratios


def inputs(shape: Shape, dtype: torch.dtype) -> Parts:
    """Queries, keys, values and a bias."""
    generator = torch.Generator().manual_seed(0)
    _, heads, tokens, _ = shape
    shapes = (shape, shape, shape, (heads, tokens, tokens))
    q, k, v, bias = (torch.randn(size, generator=generator).to(device(), dtype) for size in shapes)
    return q, k, v, bias


def has_backward(parts: Parts) -> bool:
    """Whether FlexAttention has a backward on the device of these tensors, which require gradients."""
    try:
        KERNELS["flex"](*parts)
    except NotImplementedError:
        return False
    return True


def _gradients(kernel: Attend, parts: Parts) -> None:
    out = kernel(*parts)
    torch.autograd.grad(out, parts, torch.ones_like(out))


if __name__ == "__main__":
    main(measure, __doc__)
