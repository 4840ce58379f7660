"""The benchmark of encoding, in small."""

from pathlib import Path

import pytest
import torch

from benchmarks.encode import Task, contest

TASK = Task((4, 8), 5, 32, batch_size=2, block_rows=4, precisions=("float32", "bfloat16"), rounds=1, groups=2)


def test_contest_in_small(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    results, ratios = contest(TASK, tmp_path)
    values = {result.name: result.value for result in results}
    for suffix in ("", "_bfloat16"):
        assert ratios[f"encode_vs_forward{suffix}"] == pytest.approx(
            values[f"encode{suffix}"] / values[f"forward{suffix}"]
        )
        assert values[f"encode{suffix}"] == pytest.approx(5 / (values[f"stage{suffix}"] - values[f"once{suffix}"]))
    assert torch.get_float32_matmul_precision() == before
