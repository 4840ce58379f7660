"""Samples that are guided by another model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from forked import Job, Template
from test_sample import assert_near, changed, decoded, images

import dit
from dit import sample
from dit.diffusion.config import DiffusionConfig, EDMConfig, FlowConfig
from dit.draw import preview
from dit.export import EMA_WEIGHTS, RAW_WEIGHTS, CheckpointManifest, ModelCard
from dit.models.choice import DiTChoice, Shape
from dit.models.cost import cost
from dit.sample import SampleManifest
from dit.samplers import guide
from dit.samplers.config import SampleConfig
from dit.samplers.noise import SampleNoise
from dit.vae import VaeRef
from storage.errors import InputError
from storage.estimate import PlanContext
from storage.latents import LatentManifest
from storage.manifest import StageOutput
from storage.rows.store import RowReader
from storage.tracker import NullTracker

COUNT, SCALE = tiny.SAMPLING.count, 3.0
SMALLER = DiTChoice(size=Shape(depth=1, width=16, heads=2), patch_size=4)


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory, latents: LatentManifest) -> CheckpointManifest:
    """A smaller model, less trained, which knows no null label."""
    model = SMALLER.model_copy(update={"label_dropout": 0.0})
    config = tiny.TRAINING.model_copy(update={"model": model, "steps": 4})
    return tiny.run_train(tmp_path_factory.mktemp("worse"), config, latents)


def guided(worse: CheckpointManifest, **fields: object) -> SampleConfig:
    return changed(**{"guide": worse.uri, "guidance_scale": SCALE, **fields})


def output(root: Path, config: SampleConfig, checkpoint: CheckpointManifest) -> StageOutput:
    return tiny.output(root, SampleManifest, config, checkpoint=checkpoint, **guide.parents(config))


def run(root: Path, config: SampleConfig, checkpoint: CheckpointManifest) -> SampleManifest:
    return sample.run(config, checkpoint, out=output(root, config, checkpoint), tracker=NullTracker())


def ddim_by_hand(good: torch.nn.Module, bad: torch.nn.Module, x: torch.Tensor, y: Any, kept: list[int]) -> torch.Tensor:
    """DDIM of the expected data D = D_bad + s (D_good - D_bad), straight from both definitions."""
    cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for place in reversed(range(len(kept))):
        now, then = cumprod[kept[place]], cumprod[kept[place - 1]] if place else 1.0
        t = torch.full((len(x),), kept[place])
        with torch.no_grad():
            data = [(x - (1 - now) ** 0.5 * model(x, t, y)[:, :4]) / now**0.5 for model in (good, bad)]
        x0 = data[1] + SCALE * (data[0] - data[1])
        x = then**0.5 * x0 + (1 - then) ** 0.5 * (x - now**0.5 * x0) / (1 - now) ** 0.5
    return x.float()


@pytest.mark.parametrize(("weights", "file"), [("ema", EMA_WEIGHTS), ("raw", RAW_WEIGHTS)])
def test_samples_are_the_sampler_with_the_difference_of_both_models(
    tmp_path: Path, checkpoint: CheckpointManifest, worse: CheckpointManifest, vae: VaeRef, weights: str, file: str
) -> None:
    config = guided(worse, sampler="ddim", steps=5, guide_weights=weights)
    samples = run(tmp_path, config, checkpoint)
    bad = dit.load(worse.uri, weights=file).model
    noise = SampleNoise(config.seed, range(COUNT), (4, 8, 8)).initial()
    labels = torch.arange(COUNT) % 3
    latents = ddim_by_hand(dit.load(checkpoint.uri).model, bad, noise, labels, [0, 250, 500, 749, 999])
    assert_near(images(samples), decoded(vae, latents))
    facts = {"guide": worse.digest, "guide_weights": weights, "guide_training_steps": 4, "guidance_scale": SCALE}
    assert facts.items() <= samples.conditions.items()
    assert samples.inputs["guide"] == worse.digest
    assert samples.parent("guide", CheckpointManifest).uri == worse.uri


def test_at_scale_1_nothing_guides(tmp_path: Path, checkpoint: CheckpointManifest, worse: CheckpointManifest) -> None:
    config = guided(worse, guidance_scale=1.0)
    assert config.identity() == changed(guidance_scale=1.0).identity()
    samples = run(tmp_path, config, checkpoint)
    plain = run(tmp_path / "plain", changed(guidance_scale=1.0), checkpoint)
    assert (samples.digest, samples.conditions) == (plain.digest, plain.conditions)
    assert np.array_equal(images(samples), images(plain))


def test_a_model_without_a_null_label_and_one_without_labels_are_guided(
    tmp_path: Path, latents: LatentManifest, worse: CheckpointManifest
) -> None:
    changes: list[dict[str, object]] = [{"label_dropout": 0.0}, {"conditional": False}]
    known, unknown = (
        tiny.run_train(
            tmp_path, tiny.TRAINING.model_copy(update={"model": tiny.MODEL.model_copy(update=change)}), latents
        )
        for change in changes
    )
    with pytest.raises(InputError, match=r"guidance_scale: without label dropout.*; use 1, or name a worse model in"):
        run(tmp_path, changed(guidance_scale=SCALE), known)
    found = images(run(tmp_path, guided(worse), known))
    assert np.abs(found - images(run(tmp_path, changed(guidance_scale=1.0), known))).max() > 1
    with pytest.raises(InputError, match="has num_classes 3, and the model 0"):
        run(tmp_path, guided(worse), unknown)
    config = tiny.TRAINING.model_copy(update={"model": SMALLER.model_copy(update={"conditional": False}), "steps": 4})
    samples = run(tmp_path, guided(tiny.run_train(tmp_path, config, latents)), unknown)
    assert RowReader(samples).array("label").tolist() == [-1] * COUNT
    assert samples.conditions["guidance_scale"] == SCALE
    assert np.abs(images(samples) - images(run(tmp_path, changed(guidance_scale=1.0), unknown))).max() > 1


@pytest.mark.full
def test_two_ranks_make_the_same_bytes(
    tmp_path: Path, checkpoint: CheckpointManifest, worse: CheckpointManifest, template: Template
) -> None:
    config = guided(worse)
    out = output(tmp_path / "ranks", config, checkpoint)
    template.finish(Job(out, config, checkpoint))
    alone = run(tmp_path, config, checkpoint)
    assert tiny.objects(SampleManifest.read(out.uri)) == tiny.objects(alone)


def test_a_guide_is_compiled_too(
    tmp_path: Path, checkpoint: CheckpointManifest, worse: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: asked.append(self))
    run(tmp_path, guided(worse, compile=True), checkpoint)
    assert [model.get_parameter("final_layer.linear.weight").shape[1] for model in asked] == [32, 16]


def test_a_picture_without_a_recipe_is_guided_too(
    tmp_path: Path, checkpoint: CheckpointManifest, worse: CheckpointManifest
) -> None:
    config, trained = guided(worse, block_rows=COUNT), dit.load(checkpoint.uri)
    preview(trained, config, str(tmp_path / "out"), NullTracker())
    found = np.load(tmp_path / "out" / "samples.npz")["arr_0"].astype(int)
    assert_near(found, images(run(tmp_path, config, checkpoint)))


def test_a_plan_counts_both_networks(checkpoint: CheckpointManifest, worse: CheckpointManifest, tmp_path: Path) -> None:
    def seconds(config: SampleConfig) -> float:
        rates = {"sample": 1.0, "decode": 1e12}
        plan = PlanContext(output(tmp_path, config, checkpoint), rates, 1, 1, {})
        return sample.estimate(config, checkpoint, plan).seconds

    good, bad = (cost(manifest.card.model).macs for manifest in (checkpoint, worse))
    assert bad < good / 2
    passes = COUNT * tiny.SAMPLING.steps * 2
    assert seconds(changed(guidance_scale=1.0)) == pytest.approx(passes * good)
    assert seconds(changed(guidance_scale=SCALE)) == pytest.approx(passes * 2 * good)
    assert seconds(guided(worse)) == pytest.approx(passes * (good + bad))


def other_card(card: ModelCard, **changes: Any) -> ModelCard:
    """A card with other values; those of its model and its autoencoder by ``model__name`` and ``vae__name``."""
    values = card.model_dump(mode="json")
    for name, value in changes.items():
        place, _, field = name.partition("__")
        if field:
            values[place][field] = value
        else:
            values[place] = value
    return ModelCard.model_validate(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"diffusion": EDMConfig().model_dump()}, "has diffusion.kind edm, and the model gaussian"),
        ({"diffusion": FlowConfig().model_dump()}, "has diffusion.kind flow, and the model gaussian"),
        ({"diffusion": DiffusionConfig(steps=500).model_dump()}, "has diffusion.steps 500, and the model 1000"),
        ({"vae__sha256": "0" * 64}, f"has vae.sha256 {'0' * 64}, and the model "),
        ({"vae__scaling_factor": 0.5}, "has vae.scaling_factor 0.5, and the model 0.7"),
        ({"vae": None}, "has vae.sha256 none, and the model "),
        (
            {"channels": {"mean": [0, 0, 0, 0], "deviation": [1, 1, 2, 1]}},
            "has mean of channel 0 0.0, and the model none",
        ),
        ({"model__input_size": 16}, "has input_size 16, and the model 8"),
        ({"model__num_classes": 2, "class_names": ["2", "5"]}, "has num_classes 2, and the model 3"),
        ({"class_names": ["2", "5", "8"]}, "has class 2 8, and the model 7"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused_before_anything_runs(
    tmp_path: Path, checkpoint: CheckpointManifest, worse: CheckpointManifest, change: dict[str, Any], reason: str
) -> None:
    (tmp_path / EMA_WEIGHTS).write_bytes(worse.read_object(EMA_WEIGHTS))
    tiny.commit_model(tmp_path, other_card(worse.card, **change))
    config, plan = changed(guide=str(tmp_path)), SimpleNamespace(world_size=1)
    with pytest.raises(InputError, match=rf"^sample\.guide: {tmp_path} {reason}.*; name a model of the same process"):
        sample.check(config, checkpoint, plan)


def test_a_guide_may_be_trained_otherwise(
    tmp_path: Path, checkpoint: CheckpointManifest, worse: CheckpointManifest
) -> None:
    """How the times of training are drawn is no part of what a model predicts."""
    (tmp_path / EMA_WEIGHTS).write_bytes(worse.read_object(EMA_WEIGHTS))
    flow = FlowConfig(times="logit_normal", cosine=1.0).model_dump()
    tiny.commit_model(tmp_path, other_card(worse.card, diffusion=flow))
    card = other_card(checkpoint.card, diffusion=FlowConfig().model_dump())
    assert guide.guide_of(changed(guide=str(tmp_path)), card) is not None


def test_what_is_no_guide_is_refused(
    tmp_path: Path, checkpoint: CheckpointManifest, latents: LatentManifest, worse: CheckpointManifest
) -> None:
    plan = SimpleNamespace(world_size=1)
    for config, reason in {
        changed(guide=str(tmp_path / "gone")): r"^sample\.guide: .*gone: no finished output",
        changed(guide=latents.uri): r"^sample\.guide: .*: an output of 'encode'; one of 'train' is needed",
        guided(worse, guide_weights="ema-0.7"): r"^sample\.guide_weights: .* has no model-ema-0\.7\.safetens",
    }.items():
        with pytest.raises(InputError, match=reason):
            sample.check(config, checkpoint, plan)
        with pytest.raises(InputError, match=reason):
            run(tmp_path, config, checkpoint)
    with pytest.raises(ValueError, match="credentials"):
        changed(guide="s3://user:secret@bucket/model")
    with pytest.raises(ValueError, match="guide_weights"):
        changed(guide_weights="../../model")
