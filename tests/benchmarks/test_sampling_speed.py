"""The benchmark of sampling, in small."""

from pathlib import Path

import pytest
import tiny
import torch

from benchmarks import sampling_speed as sampling
from benchmarks.sampling_speed import RATIOS, Task
from dit.diffusion.config import DiffusionConfig
from dit.export import EMA_WEIGHTS, CheckpointManifest, ModelCard, export
from dit.models.config import DiTConfig
from dit.vae import load_vae

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


def trained(folder: Path, *, pixels: bool = False) -> Path:
    """A DiT with random weights, on the latents of a small autoencoder or on pixels."""
    ref = tiny.save_vae(folder / "vae")
    model = DiTConfig(input_size=8, in_channels=3 if pixels else 4, width=32, depth=1, heads=2, num_classes=3)
    card = ModelCard(
        model=model,
        diffusion=DiffusionConfig(),
        vae=None if pixels else load_vae(ref).info(ref.source),
        resolution=8 if pixels else 32,
        class_names=("a", "b", "c"),
        steps=0,
    )
    out = tiny.output(folder, CheckpointManifest, tiny.TRAINING)
    card, files = export(out, card, {EMA_WEIGHTS: dict(sampling._model(model).state_dict())})
    return Path(out.commit(CheckpointManifest, files, counts={}, card=card).uri)


def test_a_trained_model_and_its_autoencoder_take_turns_with_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "TRAINED_IMAGES", 4)
    monkeypatch.setattr(sampling, "SMALL", Task(TASK.model, TASK.widths, TASK.groups, images=2, steps=2, rounds=1))
    with torch.compiler.set_stance("force_eager"):
        _, ratios = sampling.measure(trained(tmp_path))
    assert set(ratios) == set(RATIOS)
    with pytest.raises(ValueError, match="for a DiT on latents only"):
        sampling.measure(trained(tmp_path / "pixels", pixels=True))
