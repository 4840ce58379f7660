"""Which kernels compute the attention of training."""

import torch
from torch.profiler import ProfilerActivity, profile

from dit.devices import device
from dit.doctor.small import CASES, drawn, loss_and_gradients
from dit.training.per_block import choose_attention
from storage.finding import Finding, ok, warning

CALLED = "aten::_scaled_dot_product_"
"""Begins the name of the operator that torch chooses for an attention; the rest names the kernel."""
FUSED = ("flash_attention", "cudnn_attention", "efficient_attention")
"""Kernels that do not keep the scores (B, heads, N, N)."""
BY_PRODUCTS = "matrix products"


def check() -> Finding:
    """Whether the attention of each model, forward and backward in bfloat16, runs in a fused kernel."""
    used = {name: kernels(name) for name in CASES}
    seen = "; ".join(f"{name}: {', '.join(found)}" for name, found in used.items())
    if device().type == "cpu":
        return ok(f"on the CPU {seen}")
    plain = [name for name, found in used.items() if not set(found) <= set(FUSED)]
    if plain:
        remedy = "attention keeps all scores and is slow: try another version of torch, or a later GPU"
        return warning(f"no fused kernel for {', '.join(plain)}: {seen}", remedy)
    return ok(seen)


def kernels(name: str) -> list[str]:
    """The kernels of a case's attention, such as ``flash_attention``; `BY_PRODUCTS` if torch was asked for none."""
    case = CASES[name]
    model = drawn(case)
    choose_attention(model, torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:  # which is where torch chooses, on any device
        loss_and_gradients(case, model, torch.bfloat16)
    chosen = {event.key.removeprefix(CALLED) for event in recorded.key_averages() if event.key.startswith(CALLED)}
    forward = sorted(kernel for kernel in chosen if not kernel.endswith("_backward"))
    return [kernel.removeprefix("attention_") for kernel in forward] or [BY_PRODUCTS]
