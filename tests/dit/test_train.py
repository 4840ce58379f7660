import json
import logging
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import synthetic
import tiny
import torch
from forked import Job, Template
from pydantic import ValidationError
from safetensors.torch import load_file

import dit
from dit import train
from dit.diffusion.gaussian import GaussianDiffusion
from dit.export import CheckpointManifest
from dit.models.build import build
from dit.models.choice import Shape
from dit.ranks import Ranks
from dit.samplers.config import SampleConfig
from dit.train import model_for
from dit.training.config import TrainConfig
from dit.training.data import Batch, Batches, open_data
from dit.training.start import decays, learning_rate
from dit.vae import VaeRef
from storage import uri
from storage.errors import DitflowError, InputError, PreemptedError, StorageError
from storage.latents import LatentManifest
from storage.order import permutation
from storage.shards.shard import ShardManifest
from storage.verify import faults


def through(tmp_path: Path, config: TrainConfig, latents: LatentManifest) -> tuple[tiny.Recorder, CheckpointManifest]:
    recorder = tiny.Recorder()
    return recorder, tiny.run_train(tmp_path, config, latents, recorder)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, latents: LatentManifest
) -> tuple[tiny.Recorder, CheckpointManifest]:
    """A run that nothing interrupts."""
    return through(tmp_path_factory.mktemp("whole"), tiny.TRAINING, latents)


def by_hand(config: TrainConfig, latents: LatentManifest) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and averaged weights of a plain loop with torch's own parts."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build(model_for(config, latents))
    process = GaussianDiffusion.from_config(config.diffusion)
    batches = Batches(
        open_data(latents),
        latents.latent_shape,
        config.batch_size,
        config.seed,
        config.flips,
        3,
        0.1,
        Ranks(),
        torch.device("cpu"),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, config.betas, config.eps, config.weight_decay
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay)
    )
    average.update_parameters(model)
    losses = []
    for step in range(config.steps):
        batch = batches(step)
        t = (batch.u * 1000).long()
        loss = process.training_terms(model, batch.x0, batch.noise, t, batch.y)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
    return losses, average.module.state_dict()


def test_losses_and_weights_are_those_of_a_plain_loop(
    whole: tuple[tiny.Recorder, CheckpointManifest], latents: LatentManifest
) -> None:
    recorder, manifest = whole
    losses, weights = by_hand(tiny.TRAINING, latents)
    assert list(recorder.values) == list(range(1, 13))
    np.testing.assert_allclose([recorder.values[step]["loss"] for step in range(1, 13)], losses, rtol=1e-4)
    found = dit.load(manifest.uri).model.state_dict()
    for name, tensor in found.items():
        if name.endswith(
            "qkv.bias"
        ):  # softmax does not see the keys' part: its gradient is rounding, which Adam blows up
            continue
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4)


def test_betas_eps_and_weight_decay_are_adamws(tmp_path: Path, latents: LatentManifest) -> None:
    fields = {"betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.1, "steps": 6}
    config = tiny.TRAINING.model_copy(update=fields)
    recorder, manifest = through(tmp_path, config, latents)
    losses, weights = by_hand(config, latents)
    np.testing.assert_allclose([recorder.values[step]["loss"] for step in range(1, 7)], losses, rtol=1e-4)
    assert abs(losses[-1] - by_hand(config.model_copy(update={"betas": (0.9, 0.999)}), latents)[0][-1]) > 1e-3
    found = dit.load(manifest.uri).model.state_dict()
    torch.testing.assert_close(found["pos_embed"], weights["pos_embed"])
    torch.testing.assert_close(found["x_embedder.proj.weight"], weights["x_embedder.proj.weight"], rtol=1e-3, atol=1e-4)


def test_manifest_describes_the_model(
    whole: tuple[tiny.Recorder, CheckpointManifest], latents: LatentManifest, vae: VaeRef
) -> None:
    recorder, manifest = whole
    model = build(model_for(tiny.TRAINING, latents))
    assert manifest.counts == {
        "steps": 12,
        "images_seen": 96,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    names = ("loss", "mse", "vlb", "gradient_norm")
    assert manifest.metrics == {f"final_{name}": recorder.values[12][name] for name in names}
    quartiles = {f"loss_quartile_{number}" for number in range(1, 5)}
    found = set.union(*map(set, recorder.values.values()))
    assert found == {*names, *quartiles, "skipped_steps", "learning_rate"}
    assert recorder.values[12]["learning_rate"] == tiny.TRAINING.learning_rate
    assert recorder.rates.keys() == tiny.RATES
    assert all(math.isfinite(rate) and rate >= 0 for rate in recorder.rates.values())
    assert manifest.card.class_names == tiny.CLASSES
    assert manifest.card.model.num_classes == 3
    assert (manifest.card.resolution, manifest.card.steps) == (tiny.SIDE, 12)
    assert manifest.card.vae_ref.source == vae.source
    assert manifest.card.vae_ref.sha256 == latents.vae.sha256
    assert recorder.artifacts["loss.png"] == manifest.read_object("artifacts/loss.png")
    assert recorder.steps[-1] == (12, 12, "steps")
    assert not faults(manifest, full=True)


@pytest.mark.parametrize(("when", "resumed_after"), [(3, 0), (4, 0), (5, 4), (7, 4), (11, 8)])
def test_an_interrupted_run_ends_in_the_same_bits(
    tmp_path: Path,
    latents: LatentManifest,
    whole: tuple[tiny.Recorder, CheckpointManifest],
    when: int,
    resumed_after: int,
) -> None:
    """Killed as a step is logged, which is before its checkpoint is written."""
    first, expected = whole
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(when))
    torch.rand(7)  # the state of torch's own generator does not matter
    recorder, manifest = through(tmp_path, tiny.TRAINING, latents)
    assert list(recorder.values) == list(range(resumed_after + 1, 13))
    assert recorder.values == {step: first.values[step] for step in recorder.values}
    assert tiny.objects(manifest) == tiny.objects(expected)


def test_a_run_may_be_killed_again_and_again(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    config = tiny.TRAINING.model_copy(update={"checkpoint_every": 1, "keep_checkpoints": 1})
    for when in (2, 3, 6, 9, 12):
        with pytest.raises(tiny.Killed):
            tiny.run_train(tmp_path, config, latents, tiny.Killer(when))
    assert tiny.objects(tiny.run_train(tmp_path, config, latents)) == tiny.objects(whole[1])


def test_a_broken_checkpoint_costs_time_but_no_bits(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(10))
    (state,) = tmp_path.rglob("step-000000008/state-00000-000.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    recorder, manifest = through(tmp_path, tiny.TRAINING, latents)
    assert min(recorder.values) == 5
    assert tiny.objects(manifest) == tiny.objects(whole[1])


class Preempter(tiny.Recorder):
    """Wants the machine back at a step."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.when = when

    def progress(self, done: int, total: int, unit: str) -> None:
        if done == self.when:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_goes(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match="stopped by SIGTERM at step 7; run the same command to continue"):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, Preempter(6))
    assert signal.getsignal(signal.SIGTERM) is before
    recorder, manifest = through(tmp_path, tiny.TRAINING, latents)
    assert min(recorder.values) == 8
    assert tiny.objects(manifest) == tiny.objects(whole[1])


def test_sigterm_at_the_last_step_comes_too_late(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    manifest = tiny.run_train(tmp_path, tiny.TRAINING, latents, Preempter(11))
    assert tiny.objects(manifest) == tiny.objects(whole[1])


class Filler(tiny.Recorder):
    """Fills the disk at a step: no file may be longer than this."""

    def progress(self, done: int, total: int, unit: str) -> None:
        if done == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            StorageError, match=r"step-000000008/state-00000-000.safetensors: the disk is full .* make room"
        ):
            tiny.run_train(tmp_path, tiny.TRAINING, latents, Filler())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.parent.name for path in tmp_path.rglob("record.json")] == ["step-000000004"]
    recorder, manifest = through(tmp_path, tiny.TRAINING, latents)
    assert min(recorder.values) == 5
    assert tiny.objects(manifest) == tiny.objects(whole[1])


def test_how_often_to_log_and_save_changes_no_weights(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    config = tiny.TRAINING.model_copy(update={"log_every": 5, "checkpoint_every": 3, "keep_checkpoints": 3})
    recorder, manifest = through(tmp_path, config, latents)
    assert manifest.digest == whole[1].digest
    assert recorder.values == {step: whole[0].values[step] for step in (5, 10, 12)}
    for name in ("model.safetensors", "model-raw.safetensors", "model.json"):
        assert manifest.read_object(name) == whole[1].read_object(name)
    folders = sorted(path.name for path in Path(manifest.uri, "checkpoints").iterdir())
    assert folders == ["step-000000006", "step-000000009", "step-000000012"]


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_micro_batches_change_the_order_of_sums_alone(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest], micro_batch: int
) -> None:
    config = tiny.TRAINING.model_copy(update={"micro_batch": micro_batch})
    recorder, manifest = through(tmp_path, config, latents)
    assert manifest.digest == whole[1].digest
    for step, values in recorder.values.items():
        assert values["loss"] == pytest.approx(whole[0].values[step]["loss"], rel=1e-5)
    assert recorder.values[1]["loss"] == pytest.approx(whole[0].values[1]["loss"], rel=1e-7)


def test_blocks_gone_through_twice_change_no_bit(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    config = tiny.TRAINING.model_copy(update={"checkpoint_activations": True})
    manifest = tiny.run_train(tmp_path, config, latents)
    assert manifest.digest == whole[1].digest
    assert tiny.objects(manifest) == tiny.objects(whole[1])


def test_a_compiler_that_makes_nan_is_named_after_the_first_step(
    latents: LatentManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        return lambda *given: tuple(value * math.nan for value in graph(*given))

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=spoiled))
    torch.compiler.reset()
    config = tiny.TRAINING.model_copy(update={"compile": True, "steps": 4})
    line = (
        r"^train\.compile: the first loss .* is not finite, without compilation it is [\d.]+; set train\.compile=false"
    )
    with pytest.raises(DitflowError, match=line):
        tiny.run_train(tmp_path, config, latents)


def test_a_compiled_run_is_near_and_goes_on_in_the_same_bits(
    tmp_path: Path,
    latents: LatentManifest,
    whole: tuple[tiny.Recorder, CheckpointManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether its blocks are gone through once or twice. All of a compiler but its code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    torch.compiler.reset()
    config = tiny.TRAINING.model_copy(update={"compile": True, "steps": 4, "checkpoint_every": 2})
    recorder, manifest = through(tmp_path / "through", config, latents)
    losses, expected = ([run.values[step]["loss"] for step in range(1, 5)] for run in (recorder, whole[0]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert config.identity() != config.model_copy(update={"compile": False}).identity()
    twice = config.model_copy(update={"checkpoint_activations": True})
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path / "killed", twice, latents, tiny.Killer(3))
    assert tiny.objects(tiny.run_train(tmp_path / "killed", config, latents)) == tiny.objects(manifest)


def test_several_averages_are_those_of_runs_with_one_each(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    config = tiny.TRAINING.model_copy(update={"ema_decays": (0.9, 0.25)})
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, config, latents, tiny.Killer(7))
    manifest = tiny.run_train(tmp_path, config, latents)
    assert manifest.digest != whole[1].digest
    for name in ("model.safetensors", "model-raw.safetensors"):
        assert manifest.read_object(name) == whole[1].read_object(name)
    other = tiny.run_train(tmp_path, tiny.TRAINING.model_copy(update={"ema_decay": 0.9}), latents)
    assert manifest.read_object("model-ema-0.9.safetensors") == other.read_object("model.safetensors")
    third = dit.load(manifest.uri, weights="model-ema-0.25.safetensors").model.state_dict()
    assert not torch.equal(third["pos_embed"], dit.load(manifest.uri).model.state_dict()["x_embedder.proj.weight"])
    assert manifest.card.weights.keys() == {
        f"model{which}.safetensors" for which in ("", "-raw", "-ema-0.9", "-ema-0.25")
    }
    assert not faults(manifest, full=True)


def test_samples_are_drawn_along_the_way_and_change_no_bit(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest], vae: VaeRef
) -> None:
    """From the average of that step, by the process' own sampler: the last ones are those of the finished model."""
    config = tiny.TRAINING.model_copy(update={"sample_every": 6})
    before = torch.random.get_rng_state()
    recorder, manifest = through(tmp_path, config, latents)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert tiny.objects(manifest) == tiny.objects(whole[1])
    drawn = {name: data for name, data in recorder.artifacts.items() if name.startswith("samples")}
    assert list(drawn) == ["samples-000000006.png", "samples-000000012.png"]
    sampling = SampleConfig(count=40, labels="balanced", sampler="ddim", steps=25, batch_size=8)
    samples = tiny.run_sample(tmp_path, sampling, manifest)
    assert samples.read_object("artifacts/samples.png") == drawn["samples-000000012.png"]
    assert drawn["samples-000000006.png"] != drawn["samples-000000012.png"]


def test_without_the_decoder_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny.TRAINING.model_copy(update={"sample_every": 2, "steps": 2})
    recorder, manifest = through(tmp_path, config, synthetic.latents(tmp_path))
    assert manifest.counts["steps"] == 2
    assert list(recorder.artifacts) == ["loss.png"]
    assert "no sample grid at this step: nowhere" in caplog.text


def test_the_seed_decides(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    before = torch.random.get_rng_state()
    other = tiny.run_train(tmp_path, tiny.TRAINING.model_copy(update={"seed": 1}), latents)
    assert other.metrics["final_loss"] != whole[1].metrics["final_loss"]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_learns(tmp_path: Path, latents: LatentManifest) -> None:
    config = tiny.TRAINING.model_copy(update={"steps": 150, "learning_rate": 3e-3, "batch_size": 16})
    recorder, _ = through(tmp_path, config, latents)
    mse = [values["mse"] for values in recorder.values.values()]
    assert 0.9 < mse[0] < 1.1  # an untrained model predicts zero
    assert np.mean(mse[-30:]) < 0.6


def test_half_precision_is_near(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    recorder, manifest = through(tmp_path, tiny.TRAINING.model_copy(update={"precision": "bfloat16"}), latents)
    losses, expected = ([run.values[step]["loss"] for step in range(1, 13)] for run in (recorder, whole[0]))
    np.testing.assert_allclose(losses, expected, rtol=0.1)
    assert losses != expected
    assert dit.load(manifest.uri).model.state_dict()["pos_embed"].dtype == torch.float32


def test_without_classes(tmp_path: Path, latents: LatentManifest) -> None:
    config = tiny.TRAINING.model_copy(update={"model": tiny.MODEL.model_copy(update={"conditional": False})})
    manifest = tiny.run_train(tmp_path, config, latents)
    assert manifest.card.model.num_classes == 0
    assert not any("y_embedder" in name for name in dit.load(manifest.uri).model.state_dict())


DIVERGED = (
    "training diverged: 3 steps from step 2 on had no finite loss or gradient; the first of them used images "
    "{}, ... of the store; lower train.learning_rate, check these images, or set train.verify=every_start "
    "to see if bits flipped"
)


def test_a_loss_that_stays_without_a_number_ends_the_run_at_the_last_good_checkpoint(
    tmp_path: Path, latents: LatentManifest, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"learning_rate": 1e30, "log_every": 100, "checkpoint_every": 1, "max_skipped": 3, "batch_size": 9}
    config = tiny.TRAINING.model_copy(update=changes)
    with pytest.raises(DitflowError) as caught, caplog.at_level(logging.WARNING):
        tiny.run_train(tmp_path, config, latents)
    line = DIVERGED.format(", ".join(map(str, permutation(config.seed, 0, tiny.COUNT)[9:17])))
    assert str(caught.value) == line
    assert f"{line}; restarting from the last checkpoint" in caplog.messages
    (state,) = tmp_path.rglob("state-00000-000.safetensors")  # of the step before
    assert state.parent.name == "step-000000001"
    assert all(tensor.isfinite().all() for tensor in load_file(state).values())


class Faulty(Batches):
    """The batches of some steps are spoilt when they are made first, as by a fault of the machine."""

    spoilt: ClassVar[set[int]] = set()

    def __call__(self, step: int) -> Batch:
        batch = super().__call__(step)
        if step in self.spoilt:
            self.spoilt.discard(step)
            return replace(batch, x0=torch.full_like(batch.x0, torch.nan))
        return batch


def test_steps_that_are_not_finite_are_left_out(
    tmp_path: Path,
    latents: LatentManifest,
    whole: tuple[tiny.Recorder, CheckpointManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint that would be written in between is not, and a restart knows how many they were."""
    monkeypatch.setattr(train, "Batches", Faulty)
    monkeypatch.setattr(Faulty, "spoilt", {2})
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(6))
    Faulty.spoilt.update({6, 7})
    recorder = tiny.Recorder()
    manifest = tiny.run_train(tmp_path, tiny.TRAINING, latents, recorder)
    assert list(recorder.values) == list(range(5, 13))
    assert {step: values["skipped_steps"] for step, values in recorder.values.items()} == {
        5: 1, 6: 1, 7: 2, 8: 3, 9: 3, 10: 3, 11: 3, 12: 3,
    }  # fmt: skip
    assert "loss" not in recorder.values[7]
    assert recorder.values[9]["loss"] != whole[0].values[9]["loss"]
    assert manifest.counts["steps"] == 12
    saved = sorted(path.name for path in Path(manifest.uri, "checkpoints").iterdir())
    assert saved == ["step-000000004", "step-000000012"]


def test_a_fault_that_passes_costs_the_way_back_and_no_bits(
    tmp_path: Path,
    latents: LatentManifest,
    whole: tuple[tiny.Recorder, CheckpointManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "Batches", Faulty)
    monkeypatch.setattr(Faulty, "spoilt", {8, 9, 10})
    config = tiny.TRAINING.model_copy(update={"max_skipped": 3})
    assert tiny.objects(tiny.run_train(tmp_path, config, latents)) == tiny.objects(whole[1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patch_size": 3}, "train.model: does not fit the latents: input_size 8 is not a multiple of patch_size 3"),
        ({"size": Shape(depth=1, width=32, heads=3)}, "width 32 is not a multiple of heads 3"),
        ({"size": Shape(depth=1, width=6, heads=2)}, "width 6 is not a multiple of 4"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, latents: LatentManifest, changes: dict[str, Any], reason: str
) -> None:
    config = tiny.TRAINING.model_copy(update={"model": tiny.MODEL.model_copy(update=changes)})
    with pytest.raises(InputError, match=reason):
        tiny.run_train(tmp_path, config, latents)


def test_the_learning_rate_warms_up() -> None:
    config = tiny.TRAINING.model_copy(update={"learning_rate": 0.3, "warmup_steps": 3})
    assert [learning_rate(config, step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    assert learning_rate(tiny.TRAINING, 0) == tiny.TRAINING.learning_rate


def test_a_warm_up_in_images_is_as_long_for_any_batch_size() -> None:
    config = TrainConfig.model_validate({"batch_size": 8, "learning_rate": 0.5, "warmup_images": 20, "steps": 6})
    assert [learning_rate(config, step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.5, 0.5])
    larger = config.model_copy(update={"batch_size": 16})
    assert [learning_rate(larger, step) for step in range(3)] == pytest.approx([0.4, 0.5, 0.5])
    falling = config.model_copy(update={"decay": "linear"})
    assert [learning_rate(falling, step) for step in (2, 3, 5)] == pytest.approx([0.5, 0.5 * 3 / 3.5, 0.5 / 3.5])


@pytest.mark.parametrize("batch_size", [256, 512])
def test_a_half_life_in_images_is_as_long_for_any_batch_size(batch_size: int) -> None:
    config = TrainConfig(batch_size=batch_size, ema_halflife_images=500_000, ema_decays=(0.9,))
    steps = 500_000 / batch_size
    assert decays(config)["ema"] ** steps == pytest.approx(0.5)
    assert decays(config)["ema-0.9"] == 0.9


@pytest.mark.parametrize(
    ("images", "steps"), [("warmup_images", {"warmup_steps": 5}), ("ema_halflife_images", {"ema_decay": 0.99})]
)
def test_the_same_in_steps_and_in_images_is_refused(images: str, steps: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=f"{images}: takes the place of {next(iter(steps))}, which must be left"):
        TrainConfig.model_validate({images: 500, **steps})


@pytest.mark.parametrize(
    ("decay", "rates"), [("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.8535534, 0.5, 0.1464466])]
)
def test_the_learning_rate_falls_behind_the_warm_up(decay: str, rates: list[float]) -> None:
    changes = {"learning_rate": 1.0, "warmup_steps": 2, "steps": 6, "decay": decay}
    config = tiny.TRAINING.model_copy(update=changes)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx([0.5, 1, *rates])


def test_the_learning_rate_falls_to_a_share_of_its_peak() -> None:
    config = tiny.TRAINING.model_copy(update={"learning_rate": 2.0, "steps": 4, "decay": "linear", "decay_to": 0.2})
    assert [learning_rate(config, step) for step in range(5)] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_flips_need_latents_of_both(tmp_path: Path, shards: ShardManifest, vae: VaeRef) -> None:
    plain = tiny.run_encode(tmp_path, tiny.encode_config(vae, flips=False), shards)
    with pytest.raises(InputError, match="no mirror images; set encode.flips=true"):
        tiny.run_train(tmp_path, tiny.TRAINING, plain)
    manifest = tiny.run_train(tmp_path, tiny.TRAINING.model_copy(update={"flips": False}), plain)
    assert manifest.counts["steps"] == 12


def test_a_streamed_run_ends_in_the_same_bits(tmp_path: Path, latents: LatentManifest) -> None:
    config = tiny.TRAINING.model_copy(update={"order": "pooled"})
    streamed = config.model_copy(update={"reading": "streamed"})
    manifests = [tiny.run_train(tmp_path / each.reading, each, latents) for each in (config, streamed)]
    assert manifests[0].digest == manifests[1].digest
    assert tiny.objects(manifests[0]) == tiny.objects(manifests[1])


def test_the_order_is_part_of_what_a_run_is(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    pooled = tiny.run_train(tmp_path, tiny.TRAINING.model_copy(update={"order": "pooled"}), latents)
    assert pooled.digest != whole[1].digest
    assert pooled.metrics["final_loss"] != whole[1].metrics["final_loss"]


def test_streaming_in_shuffled_order_is_refused() -> None:
    with pytest.raises(ValidationError, match="a chunk for each image if order is shuffled; set order: pooled"):
        TrainConfig(reading="streamed")
    assert TrainConfig(reading="streamed", order="pooled").reading == "streamed"


def test_damage_is_named_before_the_first_step(tmp_path: Path, shards: ShardManifest, vae: VaeRef) -> None:
    latents = tiny.run_encode(tmp_path, tiny.encode_config(vae), shards)
    path = Path(latents.uri, "data/std/c/0/1/0/0/0")
    data = path.read_bytes()
    path.write_bytes(data[:9] + b"?" + data[10:])
    recorder = tiny.Recorder()
    with pytest.raises(StorageError, match="data/std/c/0/1/0/0/0: does not hold the bytes that were committed"):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, recorder)
    assert not recorder.steps


def test_bits_that_flip_after_the_first_start_are_noticed_if_every_start_is_to_look(
    tmp_path: Path, shards: ShardManifest, vae: VaeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = tiny.run_encode(tmp_path, tiny.encode_config(vae), shards)
    monkeypatch.setattr(uri, "version", lambda url: {"size": "the same"})  # as on a disk whose bits flip
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(2))
    path = Path(latents.uri, "data/mean/c/0/0/0/0/0")
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])  # the last bit of a mantissa
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(4))
    every = tiny.TRAINING.model_copy(update={"verify": "every_start"})
    with pytest.raises(StorageError, match="data/mean/c/0/0/0/0/0: does not hold the bytes that were .*") as caught:
        tiny.run_train(tmp_path, every, latents)
    assert "\n" not in str(caught.value)
    assert TrainConfig(verify="every_start").identity() == TrainConfig().identity()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(ValidationError, match="seed"):
        TrainConfig(seed=seed)


def history(manifest: CheckpointManifest) -> dict[int, float]:
    """Losses of the steps up to the last checkpoint."""
    records = sorted(Path(manifest.uri).rglob("record.json"))
    return {entry["step"]: entry["values"]["loss"] for entry in json.loads(records[-1].read_text())["history"]}


def test_two_ranks_train_as_one_and_go_on_alone(
    tmp_path: Path, template: Template, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    """Under the real torchrun."""
    out = tiny.output(tmp_path, CheckpointManifest, tiny.TRAINING, latents=latents)
    done = template.torchrun(Job(out, tiny.TRAINING, latents))
    assert done.codes == [[0]], done.errors
    manifest = CheckpointManifest.read(out.uri)
    losses = history(manifest)
    assert list(losses) == list(range(1, 13))
    for step, loss in losses.items():
        assert loss == pytest.approx(whole[0].values[step]["loss"], rel=1e-5)
    for name, value in manifest.metrics.items():
        assert value == pytest.approx(whole[1].metrics[name], rel=1e-4)
    Path(manifest.url).unlink()
    shutil.rmtree(Path(manifest.uri, "checkpoints", "step-000000012"))
    recorder = tiny.Recorder()
    alone = tiny.run_train(tmp_path, tiny.TRAINING, latents, recorder)
    assert list(recorder.values) == [9, 10, 11, 12]
    assert alone.metrics["final_loss"] == pytest.approx(whole[1].metrics["final_loss"], rel=1e-4)


def test_a_batch_that_the_ranks_cannot_share_is_refused(
    tmp_path: Path, template: Template, latents: LatentManifest
) -> None:
    config = tiny.TRAINING.model_copy(update={"batch_size": 7})
    out = tiny.output(tmp_path, CheckpointManifest, config, latents=latents)
    done = template.run(Job(out, config, latents))
    assert done.codes == [[1, 1]]
    assert done.errors.count("InputError: train.batch_size: 7 is not a multiple of the 2 ranks") == 2
    assert not Path(out.uri).exists()
