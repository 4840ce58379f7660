import pytest
import torch

from dit.devices import exact_float32


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
