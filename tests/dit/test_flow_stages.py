"""Every model trains as a flow, and goes on after a kill in the same bits."""

from pathlib import Path
from typing import Any

import pytest
import synthetic
import tiny

from dit.diffusion.config import FlowConfig
from dit.models.choice import DiffiTChoice, DiffiTImageChoice, ImageShape, Shape
from dit.training.config import TrainConfig

SMALL = Shape(depth=1, width=32, heads=2)
IMAGE = ImageShape(stem_width=32, widths=(32,), depths=(1,), window=4, time_width=32)
RUNS: dict[str, dict[str, Any]] = {
    "dit": {
        "model": tiny.MODEL,
        "diffusion": FlowConfig(times="logit_normal", cosine=1.0),
        "precision": "bfloat16",
    },
    "diffit": {"model": DiffiTChoice(size=SMALL), "diffusion": FlowConfig(path="gvp", predict="noise")},
    "diffit_image": {
        "model": DiffiTImageChoice(size=IMAGE, conditional=True, dropout=0.2),
        "diffusion": FlowConfig(path="vp", predict="data"),
        "augmentation": 0.3,
    },
}


def training(name: str) -> TrainConfig:
    return tiny.TRAINING.model_copy(update={"steps": 6, "checkpoint_every": 2, "learning_rate": 1e-3} | RUNS[name])


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, name: str) -> None:
    config = training(name)
    data = (synthetic.pixels if name == "diffit_image" else synthetic.latents)(tmp_path)
    recorder = tiny.Recorder()
    whole = tiny.run_train(tmp_path / "whole", config, data, recorder)
    first = recorder.values[1]  # of an untrained network, whose output is 0
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path / "killed", config, data, tiny.Killer(5))
    recorder = tiny.Recorder()
    resumed = tiny.run_train(tmp_path / "killed", config, data, recorder)
    assert list(recorder.values) == [5, 6]
    assert tiny.objects(resumed) == tiny.objects(whole)
    if name == "dit":
        assert first["cosine"] == 1
        assert first["loss"] == pytest.approx(first["mse"] + 1)
    if name == "diffit":
        assert first["loss"] == pytest.approx(1, abs=0.1)  # the variance of the noise
    assert resumed.card.diffusion == config.diffusion
    assert not getattr(resumed.card.model, "learn_variance", False)
