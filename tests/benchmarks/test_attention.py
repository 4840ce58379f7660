"""The kernels that the benchmark of the attention compares."""

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import KERNELS, compare, has_backward, inputs

SHAPE = (2, 3, 16, 8)


def test_kernels_are_the_formula() -> None:
    q, k, v, bias = inputs(SHAPE, torch.float32)
    expected = (q @ k.mT / 8**0.5 + bias).softmax(3) @ v
    for kernel in KERNELS.values():
        torch.testing.assert_close(kernel(q, k, v, bias).cpu(), expected.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_flex_attention_has_no_backward_on_a_cpu() -> None:
    parts = inputs(SHAPE, torch.float32)
    assert has_backward(parts)
    for part in parts:
        part.requires_grad_()
    assert not has_backward(parts)


def test_comparison_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.compiler.set_stance("force_eager"):
        results, ratios = compare(SHAPE, torch.float32)
    assert {"mask_forward", "mask_forward_backward", "flex_forward"} <= {result.name for result in results}
    values = {result.name: result.value for result in results}
    assert ratios["flex_vs_mask_forward"] == pytest.approx(values["mask_forward"] / values["flex_forward"])
    monkeypatch.setitem(attention.KERNELS, "flex", lambda q, k, v, bias: attention.masked(q, k, v, 2 * bias))
    with torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match="flex is"):
        compare(SHAPE, torch.float32)
