"""The stage `sample` on a model that was trained as a flow, with every sampler that fits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import dit
from dit.diffusion.config import FlowConfig
from dit.draw import preview
from dit.export import CheckpointManifest
from dit.metrics.comparison import differing
from dit.models.cost import cost
from dit.sample import SampleManifest, check_process, estimate
from dit.samplers.config import SampleConfig
from dit.samplers.table import SAMPLERS
from storage.errors import InputError
from storage.estimate import PlanContext
from storage.latents import LatentManifest
from storage.rows.store import RowReader
from storage.tracker import NullTracker

SAMPLING = SampleConfig(
    count=11, labels="balanced", sampler="euler", steps=4, guidance_scale=3, batch_size=3, block_rows=4
)
FIELDS: dict[str, dict[str, Any]] = {
    "euler": {"shift": 0.5},
    "heun": {"shift": 1.0},
    "euler_maruyama": {"shift": 1.0, "diffusion_coefficient": "linear", "last_step": 0.1},
    "dopri5": {"rtol": 1e-5, "atol": 1e-6},
}
NFE = {"euler": 4, "heun": 7, "euler_maruyama": 4}


@pytest.fixture(scope="module")
def flow(root: Path, latents: LatentManifest) -> CheckpointManifest:
    config = tiny.TRAINING.model_copy(update={"diffusion": FlowConfig(), "steps": 6})
    return tiny.run_train(root / "flow", config, latents)


def changed(**fields: object) -> SampleConfig:
    return SampleConfig.model_validate(SAMPLING.model_dump() | fields)


def images(manifest: SampleManifest) -> np.ndarray:
    return RowReader(manifest).array("image").astype(int)


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for pixels that rounding pushes over a step."""
    gap = np.abs(found - expected)
    assert gap.max() <= 1
    assert (gap > 0).mean() < 0.01


def test_every_sampler_of_flows_is_here() -> None:
    assert {("flow", name) for name in FIELDS} == {key for key in SAMPLERS if key[0] == "flow"}


@pytest.mark.parametrize("name", FIELDS)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, flow: CheckpointManifest, name: str) -> None:
    config = changed(sampler=name, **FIELDS[name])
    whole = tiny.run_sample(tmp_path / "whole", config, flow)
    with pytest.raises(tiny.Killed):
        tiny.run_sample(tmp_path / "killed", config, flow, tiny.Killer(10))
    recorder = tiny.Recorder()
    resumed = tiny.run_sample(tmp_path / "killed", config, flow, recorder)
    assert recorder.steps[0][0] == 11  # of 4, 4 and 3: the last block alone
    assert tiny.objects(resumed) == tiny.objects(whole)
    assert resumed.conditions == whole.conditions
    assert_near(
        images(tiny.run_sample(tmp_path / "batch", config.model_copy(update={"batch_size": 2}), flow)), images(whole)
    )


@pytest.mark.parametrize("name", FIELDS)
def test_conditions_are_those_that_bear_on_the_images(tmp_path: Path, flow: CheckpointManifest, name: str) -> None:
    samples = tiny.run_sample(tmp_path, changed(sampler=name, **FIELDS[name]), flow)
    conditions = dict(samples.conditions)
    nfe = conditions.pop("nfe")
    assert conditions == {
        "count": 11,
        "labels": "balanced",
        "sampler": name,
        **({} if name == "dopri5" else {"steps": 4}),
        **FIELDS[name],
        "guidance_scale": 3,
        "guidance_channels": "first3",
        "guidance_schedule": "constant",
        "rounding": "nearest",
        "weights": "ema",
        "precision": "float32",
        "seed": 0,
        "decoder_sha256": flow.card.vae.sha256 if flow.card.vae else "",
        "training_steps": 6,
    }
    stored = [entry.path for entry in samples.files if "/nfe/" in entry.path]
    if name in NFE:
        assert nfe == NFE[name]
        assert not stored
    else:
        counted = RowReader(samples).array("nfe")
        assert (counted % 6 == 2).all()  # two before the first step, six a step
        assert nfe == round(float(counted.mean()), 2)
    assert differing(samples.conditions, samples.conditions | {"nfe": 1}) == []


@pytest.mark.parametrize("name", FIELDS)
def test_the_plan_counts_the_objects_and_the_passes(tmp_path: Path, flow: CheckpointManifest, name: str) -> None:
    config = changed(sampler=name, **FIELDS[name])
    out = tiny.output(tmp_path, SampleManifest, config, checkpoint=flow)
    planned = estimate(config, flow, PlanContext(out, {"sample": 1e9, "decode": 1e9}, 1, 1, {}))
    samples = tiny.run_sample(tmp_path, config, flow)
    data = [entry for entry in samples.files if entry.path.startswith("data/") and not entry.path.endswith("zarr.json")]
    assert planned.size == sum(entry.size for entry in data)
    passes = SAMPLERS["flow", name].passes(config.steps)
    work = config.count * 2 * passes * 2 * cost(flow.card.model).macs  # of two rows each, guided
    assert planned.seconds == pytest.approx(work / 1e9, rel=1e-3)


def test_a_picture_without_a_recipe_shows_the_same(tmp_path: Path, flow: CheckpointManifest) -> None:
    config = changed(sampler="dopri5", **FIELDS["dopri5"], block_rows=11)
    preview(dit.load(flow.uri), config, str(tmp_path / "out"), NullTracker())
    found = np.load(tmp_path / "out" / "samples.npz")["arr_0"].astype(int)
    assert_near(found, images(tiny.run_sample(tmp_path, config, flow)))


def test_guidance_within_an_interval_of_times(tmp_path: Path, flow: CheckpointManifest) -> None:
    def drawn(name: str, **fields: Any) -> np.ndarray:
        return images(tiny.run_sample(tmp_path / name, changed(**fields), flow))

    unguided, guided = drawn("1", guidance_scale=1), drawn("2")
    assert not np.array_equal(unguided, guided)
    assert np.array_equal(drawn("3", guidance_interval=(0.0, 1.0)), guided)
    assert np.array_equal(drawn("4", guidance_interval=(0.8, 1.0)), unguided)  # the last step begins at 0.75
    partly = tiny.run_sample(tmp_path / "5", changed(guidance_interval=(0.25, 1.0)), flow)
    assert partly.conditions["guidance_interval"] == "0.25 to 1"
    assert not np.array_equal(images(partly), guided)


def test_the_scale_of_guidance_may_grow_towards_the_data(tmp_path: Path, flow: CheckpointManifest) -> None:
    config = changed(guidance_schedule="power_cosine")
    check_process(config, flow.card)
    found = images(tiny.run_sample(tmp_path / "1", config, flow))
    for scale in (1, config.guidance_scale):
        assert not np.array_equal(found, images(tiny.run_sample(tmp_path / "2", changed(guidance_scale=scale), flow)))


def test_a_sampler_of_timesteps_is_refused(flow: CheckpointManifest) -> None:
    with pytest.raises(InputError, match="ddpm does not fit the model's process; use euler, heun, euler_maruyama or"):
        check_process(changed(sampler="ddpm"), flow.card)


def test_steps_that_end_outside_the_bounds_are_refused(flow: CheckpointManifest) -> None:
    card = flow.card.model_copy(update={"diffusion": FlowConfig(predict="data")})
    for name in ("euler", "heun"):
        with pytest.raises(InputError, match="sample.steps: the last of 1200 begins at"):
            check_process(changed(sampler=name, steps=1200), card)
    check_process(changed(sampler="euler_maruyama", steps=1200, last_step=0.001), card)


def test_half_precision_is_near(tmp_path: Path, flow: CheckpointManifest) -> None:
    exact = images(tiny.run_sample(tmp_path / "1", changed(), flow))
    half = images(tiny.run_sample(tmp_path / "2", changed(precision="bfloat16"), flow))
    assert 0 < np.abs(half - exact).mean() < 3


def test_a_model_that_is_not_finite_is_named(tmp_path: Path, flow: CheckpointManifest, monkeypatch: Any) -> None:
    monkeypatch.setattr("dit.models.dit.DiT.forward", lambda self, x, t, y: x * torch.nan)
    for name in FIELDS:
        with pytest.raises(Exception, match="samples 0 to 2 are not finite"):
            tiny.run_sample(tmp_path, changed(sampler=name), flow)
