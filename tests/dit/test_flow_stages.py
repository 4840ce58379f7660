"""Every model trains as a flow on digits, goes on after a kill in the same bits, samples and is measured."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from dit.diffusion.config import FlowConfig
from dit.evaluate import EvaluateConfig
from dit.models.choice import DiffiTChoice, DiffiTImageChoice, ImageShape, Shape
from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from storage.latents import LatentManifest
from storage.shards.shard import ShardManifest

IMAGE = ImageShape(stem_width=32, widths=(32,), depths=(1,), window=4, time_width=32)
RUNS: dict[str, dict[str, Any]] = {
    "dit": {
        "model": tiny.MODEL,
        "diffusion": FlowConfig(times="logit_normal", cosine=1.0),
        "precision": "bfloat16",
        "sample_every": 6,
    },
    "diffit": {
        "model": DiffiTChoice(size=Shape(depth=1, width=32, heads=2)),
        "diffusion": FlowConfig(path="gvp", predict="noise"),
    },
    "diffit_image": {
        "model": DiffiTImageChoice(size=IMAGE, conditional=True, dropout=0.2),
        "diffusion": FlowConfig(path="vp", predict="data"),
        "augmentation": 0.3,
    },
}
SAMPLING = SampleConfig(count=40, labels="balanced", sampler="euler", steps=3, guidance_channels="all", block_rows=16)


@pytest.mark.parametrize("name", RUNS)
def test_every_model_from_a_kill_to_its_metrics(
    tmp_path: Path, shards: ShardManifest, latents: LatentManifest, judge: EvaluateConfig, name: str
) -> None:
    fields = {"steps": 6, "checkpoint_every": 2, "learning_rate": 1e-3}
    config: TrainConfig = tiny.TRAINING.model_copy(update=fields | RUNS[name])
    pixels = tiny.encode_config(None).model_copy(update={"resolution": 16})
    data = tiny.run_encode(tmp_path, pixels, shards) if name == "diffit_image" else latents
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
        assert "samples-000000006.png" in recorder.artifacts
    if name == "diffit":
        assert first["loss"] == pytest.approx(1, abs=0.1)  # the variance of the noise
    assert not getattr(resumed.card.model, "learn_variance", False)
    samples = tiny.run_sample(tmp_path, SAMPLING, resumed)
    assert tiny.run_evaluate(tmp_path, judge, samples).metrics
