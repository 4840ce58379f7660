"""Whether bfloat16 and compiled code compute what eager float32 computes.

A gap is the length of the difference of two vectors (the loss and all gradients of a batch, `loss_and_gradients`),
divided by the length of the one that is right.
"""

import torch
from torch import Tensor

from dit.devices import arithmetic, device
from dit.doctor.devices import BF16_CAPABILITY, described
from dit.doctor.small import CASES, Case, drawn, loss_and_gradients
from dit.training.per_block import choose_attention, compile_blocks
from dit.training.throughput import matmul_speed
from storage.finding import Finding, failed, ok, skipped, warning

TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-4}
"""Largest gap. bfloat16 rounds to 0.4 %, in some twenty layers; float32 to 6e-8, a thousand times in a sum."""

SIDE = 512
"""Of the matrices that tell whether a CPU has instructions for bfloat16."""
COMPILED = {torch.bfloat16: tuple(CASES), torch.float32: ("DiT",)}
"""What is compiled, which takes up to a minute a model."""


def bfloat16() -> Finding:
    """Whether training in bfloat16 has the gradients of float32."""
    gaps = {name: gap(_eager(case, torch.bfloat16), _eager(case, torch.float32)) for name, case in CASES.items()}
    finding = _judged(gaps, torch.bfloat16, f"bfloat16 against float32 on {described()}", "set train.precision=float32")
    if finding.state == "ok" and _is_emulated():
        return warning(f"{finding.seen}; but it is emulated here", "set train.precision=float32, which is faster here")
    return finding


def compiled(named: bool) -> Finding:
    """Whether compiled blocks compute what they compute without compilation, in both precisions.

    Args:
        named: whether the user asked for this check, which takes minutes on a CPU.
    """
    if device().type == "cpu" and not named:
        return skipped("left out on a CPU, where it takes minutes: ditflow doctor --only compile")
    seen = []
    for precision, names in COMPILED.items():
        gaps = {name: gap(_compiled(CASES[name], precision), _eager(CASES[name], precision)) for name in names}
        what = f"compiled {str(precision).removeprefix('torch.')} against eager on {described()}"
        finding = _judged(gaps, precision, what, "set train.compile=false on this machine")
        if finding.state != "ok":
            return finding
        seen.append(finding.seen)
    return ok("; ".join(seen))


def gap(found: Tensor, right: Tensor) -> float:
    """The relative length of the difference; NaN if a number is."""
    return float((found.double() - right.double()).norm() / right.double().norm())


def _is_emulated() -> bool:
    """Whether this device has no instructions for bfloat16: a CPU then takes many times as long as in float32."""
    where = device()
    if where.type == "cuda":
        return torch.cuda.get_device_capability() < BF16_CAPABILITY
    lower, full = (matmul_speed(each, where, SIDE) for each in (torch.bfloat16, torch.float32))
    return lower < full / 2


def _judged(gaps: dict[str, float], precision: torch.dtype, what: str, remedy: str) -> Finding:
    limit = TOLERANCE[precision]
    wrong = [f"{name} by {value:.2g}" for name, value in gaps.items() if not value <= limit]  # not if it is NaN
    if wrong:
        return failed(f"{what}: gradients differ: {', '.join(wrong)}; {limit:g} is allowed", remedy)
    return ok(f"{what}: gradients within {max(gaps.values()):.1g} of {len(gaps)} models")


def _eager(case: Case, precision: torch.dtype) -> Tensor:
    lower = None if precision is torch.float32 else precision
    model = drawn(case)
    choose_attention(model, lower)
    with arithmetic("float32"):
        return loss_and_gradients(case, model, lower)


def _compiled(case: Case, precision: torch.dtype) -> Tensor:
    lower = None if precision is torch.float32 else precision
    torch.compiler.reset()
    model = drawn(case)
    choose_attention(model, lower)
    compile_blocks(model)
    with arithmetic("float32"):
        return loss_and_gradients(case, model, lower)
