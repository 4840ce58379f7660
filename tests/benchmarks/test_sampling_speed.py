"""The benchmark of sampling, in small."""

import pytest
import torch

from benchmarks import sampling_speed as sampling
from benchmarks.sampling_speed import RATIOS, Task
from dit.models.config import DiTConfig

TASK = Task(DiTConfig(input_size=8, width=32, depth=1, heads=2), (8, 8), 4, images=2, steps=2, rounds=1)


def test_ours_and_the_pipeline_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.compiler.set_stance("force_eager"):
        results, ratios = sampling.sampling(TASK)
    speeds = {result.name: result.value for result in results}
    assert set(ratios) == set(RATIOS)
    for ratio, name in RATIOS.items():
        assert ratios[ratio] == pytest.approx(speeds[name] / speeds["sampling_diffusers"])
    monkeypatch.setattr(sampling, "set_differences", lambda peer: peer)
    with pytest.raises(ValueError, match="the networks disagree"):
        sampling.sampling(TASK)
