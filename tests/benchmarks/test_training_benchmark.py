"""The benchmark of whole training runs, in small."""

import math

import pytest

from benchmarks import training
from dit.models.choice import DiTChoice, Shape


@pytest.mark.full
def test_what_is_measured_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ROWS", 64)
    monkeypatch.setattr(training, "TURNS", 1)
    model = DiTChoice(size=Shape(depth=1, width=32, heads=2))
    results, ratios = training.measure(training.SMALL.model_copy(update={"model": model}), (4, 8, 8))
    values = {result.name: result.value for result in results}
    assert all(math.isfinite(value) for value in values.values())
    assert 0 <= values["s2_data_wait"] <= 100
    assert ratios == {"ddp_scaling": pytest.approx(values["s2_gloo_2"] / (2 * values["s2_gloo_1"]))}
    assert 0 < ratios["ddp_scaling"] < 2
    runs = values["s2_checkpoint_stall"] / (values["s2_checkpoint_share"] / 100)
    assert runs > 0  # seconds of as many steps as lie between checkpoints
