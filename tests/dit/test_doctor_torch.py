"""The checks of torch: they hold here, and each notices the fault that it is for."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit.doctor import all_reduce, attention, devices, golden, numerics, speed
from dit.doctor.small import CASES

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what is seen on a machine without a GPU")
MEASURED = all_reduce.Sum(ranks=8, nodes=1, backend="gloo", wrong=0, bandwidth=1e9, skew=0.0)
PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "convolution")}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Puts the number of torch's threads back, which checks set in a process of their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class TenBits(TorchDispatchMode):
    """Rounds the factors of products as TF32 does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(map(rounded, args) if func in PRODUCTS else args), **(kwargs or {}))


def rounded(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def test_losses_are_as_kept() -> None:
    found = golden.check()
    assert found.state == "ok", found


@pytest.mark.parametrize("name", CASES)
def test_a_lower_precision_is_beyond_the_tolerance(name: str) -> None:
    lower = golden.measured(CASES[name], torch.bfloat16)
    with TenBits():
        tf32 = golden.measured(CASES[name])
    assert golden.gap(lower, golden.KEPT[name]) > 10 * golden.TOLERANCE
    assert golden.gap(tf32, golden.KEPT[name]) > 2 * golden.TOLERANCE


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1.0])
def test_a_wrong_loss_fails_and_names_the_model(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    monkeypatch.setitem(golden.KEPT, "DiffiT", [(wrong, 1.0), *golden.KEPT["DiffiT"][1:]])
    found = golden.check()
    assert found.state == "failed"
    assert "DiffiT by" in found.seen
    assert "DiT by" not in found.seen.replace("DiffiT by", "")


def test_gradients_in_bfloat16_are_those_of_float32() -> None:
    found = numerics.bfloat16()
    assert found.state == "ok" or "emulated" in found.seen, found


@ON_CPU
@pytest.mark.parametrize(("speed_of_lower", "state"), [(2e9, "warning"), (8e9, "ok")])
def test_a_cpu_without_instructions_for_bfloat16_is_told(
    monkeypatch: pytest.MonkeyPatch, speed_of_lower: float, state: str
) -> None:
    speeds = {torch.bfloat16: speed_of_lower, torch.float32: 1e10}
    monkeypatch.setattr(numerics, "matmul_speed", lambda dtype, *_: speeds[dtype])
    found = numerics.bfloat16()
    assert found.state == state
    assert (found.to_do == "set train.precision=float32, which is faster here") == (state == "warning")


def test_gradients_that_are_off_or_not_finite_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    for factor in (1.2, math.nan):
        eager = numerics._eager

        def off(case: Any, precision: torch.dtype, eager: Any = eager, factor: float = factor) -> Tensor:
            return eager(case, precision) * (factor if precision is torch.bfloat16 else 1)

        with monkeypatch.context() as patch:
            patch.setattr(numerics, "_eager", off)
            found = numerics.bfloat16()
        assert found.state == "failed"
        assert "train.precision=float32" in found.to_do


@ON_CPU
def test_compilation_is_left_out_on_a_cpu_unless_it_is_asked_for() -> None:
    found = numerics.compiled(named=False)
    assert found.state == "skipped"
    assert "--only compile" in found.seen


def test_compiled_blocks_are_compared(made: list[torch.fx.GraphModule]) -> None:
    assert numerics.compiled(named=True).state == "ok"
    assert made


def test_wrong_compiled_code_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *inputs: tuple(1.5 * value for value in graph(*inputs))

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    found = numerics.compiled(named=True)
    assert found.state == "failed"
    assert "train.compile=false" in found.to_do


@ON_CPU
def test_the_kernels_of_a_cpu_are_told_and_not_judged() -> None:
    found = attention.check()
    assert found.state == "ok"
    assert "DiT: matrix products" in found.seen
    assert "DiffiT: math" in found.seen


@ON_CPU
def test_without_a_gpu_its_checks_say_so() -> None:
    for found in (devices.gpus(), devices.driver(), speed.every_gpu()):
        assert found.state == "skipped"
        assert found.seen.startswith("no GPU")


def test_a_step_has_a_share_of_the_peak() -> None:
    found = speed.mfu()
    assert found.state != "failed"
    assert "MFU" in found.seen


@pytest.mark.parametrize(
    ("answers", "state", "word"),
    [
        ([["580.1"] * 2, ["40", "61"], ["0", "0"], ["0x0000000000000004", "0x0000000000000001"]], "ok", "61 degrees"),
        ([["580.1"] * 2, ["40", "61"], ["0", "3"], ["0x0", "0x0"]], "failed", "GPU 1 counts memory errors"),
        ([["580.1"], ["90"], ["[N/A]"], ["0x0000000000000060"]], "warning", "GPU 0 by heat"),
        ([["470.1"], ["[Not Supported]"], [], []], "ok", "driver 470.1"),
    ],
)
def test_what_nvidia_smi_answers(answers: list[list[str]], state: str, word: str) -> None:
    found = devices.health(*answers)
    assert found.state == state
    assert word in found.seen


@pytest.mark.parametrize(
    ("change", "state", "word"),
    [
        ({}, "ok", "8 ranks: 1 GB/s; the gradients of DiT-XL/2, 2.7 GB, take 4.7 s"),
        ({"ranks": 1}, "ok", "gloo, 1 rank"),
        ({"wrong": 3}, "failed", "3 of them have a wrong sum"),
        ({"nodes": 2, "skew": 60.0}, "warning", "on 2 machines"),
    ],
)
def test_what_a_sum_over_ranks_means(change: dict[str, Any], state: str, word: str) -> None:
    found = all_reduce.judged(replace(MEASURED, **change))
    assert found.state == state
    assert word in found.seen


def test_one_rank_sums_in_a_group_of_its_own() -> None:
    found = all_reduce.measure()
    assert (found.ranks, found.wrong) == (1, 0)
    assert not torch.distributed.is_initialized()
