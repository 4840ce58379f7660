"""Training against a plain loop, and its options against each other."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import tiny
import torch
from forked import Job, Template
from pydantic import ValidationError

import dit
from dit.diffusion.gaussian import GaussianDiffusion
from dit.export import CheckpointManifest
from dit.models.build import build
from dit.models.choice import Shape
from dit.ranks import Ranks
from dit.samplers.config import SampleConfig
from dit.train import model_for
from dit.training.config import TrainConfig
from dit.training.data import Batches, open_data
from dit.vae import VaeRef
from storage.errors import DitflowError, InputError
from storage.latents import LatentManifest
from storage.shards.shard import ShardManifest
from storage.verify import faults


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
    recorder, manifest = tiny.through(tmp_path, config, latents)
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


def test_how_often_to_log_and_save_changes_no_weights(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    config = tiny.TRAINING.model_copy(update={"log_every": 5, "checkpoint_every": 3, "keep_checkpoints": 3})
    recorder, manifest = tiny.through(tmp_path, config, latents)
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
    recorder, manifest = tiny.through(tmp_path, config, latents)
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
    recorder, manifest = tiny.through(tmp_path / "through", config, latents)
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
    recorder, manifest = tiny.through(tmp_path, config, latents)
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
    recorder, manifest = tiny.through(tmp_path, config, synthetic.latents(tmp_path))
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
    recorder, _ = tiny.through(tmp_path, config, latents)
    mse = [values["mse"] for values in recorder.values.values()]
    assert 0.9 < mse[0] < 1.1  # an untrained model predicts zero
    assert np.mean(mse[-30:]) < 0.6


def test_half_precision_is_near(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    recorder, manifest = tiny.through(tmp_path, tiny.TRAINING.model_copy(update={"precision": "bfloat16"}), latents)
    losses, expected = ([run.values[step]["loss"] for step in range(1, 13)] for run in (recorder, whole[0]))
    np.testing.assert_allclose(losses, expected, rtol=0.1)
    assert losses != expected
    assert dit.load(manifest.uri).model.state_dict()["pos_embed"].dtype == torch.float32


def test_without_classes(tmp_path: Path, latents: LatentManifest) -> None:
    config = tiny.TRAINING.model_copy(update={"model": tiny.MODEL.model_copy(update={"conditional": False})})
    manifest = tiny.run_train(tmp_path, config, latents)
    assert manifest.card.model.num_classes == 0
    assert not any("y_embedder" in name for name in dit.load(manifest.uri).model.state_dict())


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
