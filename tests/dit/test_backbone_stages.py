"""A DiT with LightningDiT's options trains, resumes, samples and is measured on digits as the plain one."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from forked import Faults, Job, Template

from dit.evaluate import EvaluateConfig
from dit.export import CheckpointManifest
from dit.training.config import TrainConfig
from storage.latents import LatentManifest

OPTIONS: dict[str, Any] = {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True}


def training(options: dict[str, Any], **fields: Any) -> TrainConfig:
    model = tiny.MODEL.model_copy(update=options)
    return tiny.TRAINING.model_copy(update={"model": model, "steps": 6, "checkpoint_every": 2} | fields)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_resumes_in_the_same_bits_and_samples(tmp_path: Path, latents: LatentManifest, name: str) -> None:
    config = training({name: OPTIONS[name]}, precision="bfloat16")
    whole = tiny.run_train(tmp_path / "whole", config, latents)
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path / "killed", config, latents, tiny.Killer(5))
    recorder = tiny.Recorder()
    resumed = tiny.run_train(tmp_path / "killed", config, latents, recorder)
    assert list(recorder.values) == [5, 6]
    assert tiny.objects(resumed) == tiny.objects(whole)
    assert resumed.card.model.model_dump()[name] == OPTIONS[name]
    samples = tiny.run_sample(tmp_path, tiny.SAMPLING.model_copy(update={"precision": "bfloat16"}), resumed)
    assert samples.counts["images"] == tiny.SAMPLING.count


def test_samples_of_all_options_are_measured(tmp_path: Path, latents: LatentManifest, judge: EvaluateConfig) -> None:
    checkpoint = tiny.run_train(tmp_path, training(OPTIONS), latents)
    samples = tiny.run_sample(tmp_path, tiny.SAMPLING.model_copy(update={"count": 40}), checkpoint)
    assert tiny.run_evaluate(tmp_path, judge, samples).metrics


def test_parts_of_all_options_go_on_in_the_same_bits_after_a_kill(
    tmp_path: Path, template: Template, latents: LatentManifest
) -> None:
    """Sharded over two ranks, in micro-batches, with blocks gone through twice."""
    config = training(OPTIONS, parallel="fsdp", micro_batch=2, checkpoint_activations=True)
    found = []
    for name, faults in {"calm": Faults(), "killed": Faults(kills=[(0, 5)], restarts=1)}.items():
        out = tiny.output(tmp_path / name, CheckpointManifest, config, latents=latents)
        template.finish(Job(out, config, latents, ranks=2, faults=faults))
        found.append(CheckpointManifest.read(out.uri))
    calm, killed = found
    assert tiny.objects(killed) == tiny.objects(calm)
    alone = tiny.run_train(tmp_path, training(OPTIONS), latents)
    assert alone.digest == calm.digest
    assert alone.metrics["final_loss"] == pytest.approx(calm.metrics["final_loss"], rel=1e-5)
