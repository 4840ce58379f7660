import pytest
import torch

from dit.devices import Arithmetic, arithmetic, dtype, exact_float32


@pytest.mark.parametrize("before", ["highest", "high"])
def test_no_tf32_within_and_all_as_before_after(before: str) -> None:
    outside = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = True
    try:
        with pytest.raises(KeyError), exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(outside[0])
        torch.backends.cudnn.allow_tf32 = outside[1]


@pytest.mark.parametrize(("precision", "rounds"), [("float32", False), ("tf32", True), ("bfloat16", False)])
def test_tf32_is_where_it_is_asked_for_and_nowhere_else(precision: Arithmetic, rounds: bool) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with arithmetic(precision):
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == rounds
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert dtype(precision) == {"bfloat16": torch.bfloat16}.get(precision, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_only_tf32_rounds_products_on_a_gpu() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4, 64, 32, 32, device="cuda", generator=generator)
    w = torch.randn(64, 64, 3, 3, device="cuda", generator=generator)
    for work in (lambda t, u: torch.nn.functional.conv2d(t, u), lambda t, u: t.flatten(1) @ t.flatten(1).T + u.sum()):
        exact = work(x.double(), w.double())
        errors = {}
        for precision in ("float32", "tf32"):
            with arithmetic(precision):  # type: ignore[arg-type]
                errors[precision] = ((work(x, w) - exact).norm() / exact.norm()).item()
        assert errors["float32"] < 1e-6
        assert 1e-5 < errors["tf32"] < 1e-2
