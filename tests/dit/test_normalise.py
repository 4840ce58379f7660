"""Statistics of latent channels: kept by the store and the model, and undone wherever latents are decoded."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from forked import Job, Template

import dit
from dit.convert import Layout, read, write
from dit.draw import open_checkpoint, preview
from dit.encode import held_out_config
from dit.export import MODEL, CheckpointManifest, ModelCard
from dit.latent_scale import LatentScale, channel_scale
from dit.ranks import Ranks
from dit.sample import SampleManifest, draw, open_decoder
from dit.samplers.guide import guide_of
from dit.train import card_for
from dit.training.config import HeldOutLoss, Init, TrainConfig
from dit.training.data import open_data
from dit.training.draws import StepDraws
from dit.training.held_out import open_held_out
from dit.training.sample_grid import SampleGrid
from dit.training.start import initial_state
from dit.vae import VaeRef
from storage import uri
from storage.channels import PLANNED, ChannelScale
from storage.errors import InputError
from storage.latents import LatentManifest
from storage.manifest import MANIFEST
from storage.rows.store import RowReader
from storage.seal import opened, sealed
from storage.shards.shard import ShardManifest
from storage.tracker import NullTracker
from storage.verify import uncommitted

CHANNEL = tiny.TRAINING.model_copy(update={"normalise": "channel"})


def trained_on(**fields: Any) -> TrainConfig:
    return CHANNEL.model_copy(update=fields)


def numbers(latents: LatentManifest, views: slice) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel over some views, by NumPy alone."""
    rows = RowReader(latents)
    mean, std = (rows.array(name)[:, views].astype(np.float64) for name in ("mean", "std"))
    axes = (0, 1, 3, 4)
    return mean.mean(axes), np.sqrt(mean.var(axes) + np.square(std).mean(axes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, latents: LatentManifest) -> CheckpointManifest:
    """Trained on normalised channels, without interruption."""
    return tiny.run_train(tmp_path_factory.mktemp("model"), CHANNEL, latents)


@pytest.fixture
def old(tmp_path: Path, latents: LatentManifest, shards: ShardManifest, vae: VaeRef) -> LatentManifest:
    """The same store as an earlier version wrote it, whose manifest had no such field."""
    folder = Path(tiny.run_encode(tmp_path / "old", tiny.encode_config(vae), shards).uri)
    values = json.loads(opened((folder / MANIFEST).read_bytes()))
    del values["statistics"]
    (folder / MANIFEST).write_bytes(sealed(json.dumps(values).encode()))
    for record in (folder / "statistics").iterdir():
        record.unlink()
    return LatentManifest.read(str(folder))


@pytest.mark.parametrize(("flips", "views"), [(True, slice(0, 2)), (False, slice(0, 1))])
def test_statistics_are_those_of_all_latents_that_training_draws(
    latents: LatentManifest, flips: bool, views: slice
) -> None:
    scale = channel_scale("channel", latents, flips=flips)
    assert scale is not None
    mean, deviation = numbers(latents, views)
    np.testing.assert_allclose(scale.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(scale.deviation, deviation, rtol=1e-12)


def test_latents_have_mean_0_and_deviation_1(latents: LatentManifest) -> None:
    data = open_data(latents, channel_scale("channel", latents, flips=True))
    mirrored, everything = (np.arange(2 * tiny.COUNT) % 2).astype(bool), np.arange(2 * tiny.COUNT) // 2
    draws = [StepDraws(0, step, range(2 * tiny.COUNT), latents.latent_shape) for step in range(8)]
    x0 = torch.stack([data.x0(everything, mirrored, draw) for draw in draws]).double()
    assert x0.mean((0, 1, 3, 4)).tolist() == pytest.approx([0] * 4, abs=0.02)
    assert x0.std((0, 1, 3, 4)).tolist() == pytest.approx([1] * 4, abs=0.02)


@pytest.mark.parametrize("ranks", [1, 2])
def test_statistics_have_the_same_bits_after_a_kill_and_on_two_ranks(
    tmp_path: Path, latents: LatentManifest, shards: ShardManifest, vae: VaeRef, ranks: int, template: Template
) -> None:
    config = tiny.encode_config(vae)
    with pytest.raises(tiny.Killed):
        tiny.run_encode(tmp_path, config, shards, tiny.Killer(when=20))
    out = tiny.output(tmp_path, LatentManifest, config, shards=shards)
    assert sorted(path.name for path in Path(out.uri, "statistics").iterdir()) == ["rows-00000.json"]
    template.finish(Job(out, config, shards, ranks=ranks))
    found = LatentManifest.read(out.uri)
    assert found.statistics == latents.statistics is not None
    assert uncommitted(found) == []


def test_a_store_of_an_earlier_version_keeps_its_content_and_is_refused(
    old: LatentManifest, latents: LatentManifest, shards: ShardManifest, vae: VaeRef, caplog: pytest.LogCaptureFixture
) -> None:
    assert old.statistics is None
    assert old.content == latents.content
    with pytest.raises(InputError, match="train.normalise: .* an earlier version encoded.*; encode them again with"):
        card_for(CHANNEL, old)
    folder = Path(old.uri)
    (folder / MANIFEST).unlink()
    (folder / "records" / "rows-00001.json").unlink()
    repaired = tiny.run_encode(folder.parents[1], tiny.encode_config(vae), shards)
    assert (repaired.statistics, repaired.content) == (None, old.content)
    assert "encode: no statistics of the channels: some blocks have no sums" in caplog.text


def test_a_channel_without_spread_and_pixels_are_refused(
    tmp_path: Path, latents: LatentManifest, shards: ShardManifest
) -> None:
    constant = ChannelScale(mean=(0.0,) * 4, deviation=(1.0, 0.0, 1.0, 1.0))
    with pytest.raises(InputError, match="channel 1 of .* is the same number everywhere"):
        card_for(CHANNEL, latents.model_copy(update={"statistics": (constant, constant)}))
    pixels = tiny.run_encode(tmp_path, tiny.encode_config(None), shards)
    assert pixels.statistics is None
    with pytest.raises(InputError, match="train.normalise: channel is for latents, and the data are pixels"):
        card_for(CHANNEL, pixels)


def test_the_card_has_the_statistics_and_others_have_no_such_field(
    model: CheckpointManifest, latents: LatentManifest, checkpoint: CheckpointManifest
) -> None:
    card = ModelCard.model_validate_json(model.read_object(MODEL))
    assert card == model.card
    assert card.channels == channel_scale("channel", latents, flips=True)
    assert model.digest != checkpoint.digest
    assert "channels" not in json.loads(checkpoint.read_object(MODEL))
    assert "channels" not in json.loads(checkpoint.model_dump_json())["card"]


def expected_images(vae: VaeRef, latents: LatentManifest, x0: torch.Tensor) -> np.ndarray:
    """Images of normalised latents, by diffusers and NumPy's statistics."""
    mean, deviation = (torch.from_numpy(values)[:, None, None] for values in numbers(latents, slice(0, 2)))
    autoencoder = AutoencoderKL.from_pretrained(vae.source, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        raw = autoencoder.decode((x0.double() * deviation + mean).float()).sample.permute(0, 2, 3, 1).numpy()
    return np.trunc(np.clip(127.5 * raw.astype(np.float64) + 128, 0, 255))


def test_samples_are_decoded_on_the_scale_of_the_channels(
    model: CheckpointManifest, latents: LatentManifest, vae: VaeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    decode = dit.vae.Vae.decode

    def noting(self: Any, x0: torch.Tensor, *given: Any) -> torch.Tensor:
        seen.append(x0)
        return decode(self, x0, *given)

    monkeypatch.setattr(dit.vae.Vae, "decode", noting)
    trained, config = dit.load(model.uri), tiny.SAMPLING
    images = draw(config, trained, open_decoder(config, trained.card), range(3), torch.tensor([0, 1, 2]))
    assert np.abs(images - expected_images(vae, latents, torch.cat(seen))).max() <= 1


def test_the_stage_the_grids_of_training_and_the_command_draw_with_the_same_scale(
    tmp_path: Path, model: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[LatentScale | None] = []
    decode = dit.vae.Vae.decode

    def noting(self: Any, latents: torch.Tensor, *given: Any) -> torch.Tensor:
        used.append(given[1])
        return decode(self, latents, *given)

    monkeypatch.setattr(dit.vae.Vae, "decode", noting)
    tiny.run_sample(tmp_path, tiny.SAMPLING, model)
    assert SampleGrid(model.card, "float32").draw(dit.load(model.uri).model.state_dict())
    preview(open_checkpoint(model.uri), tiny.SAMPLING, str(tmp_path / "preview"), NullTracker())
    assert model.card.vae is not None
    expected = LatentScale.of(model.card.vae, model.card.channels)
    assert len(used) > 10
    for scale in used:
        assert scale is not None
        assert np.array_equal(scale.shift, expected.shift) and np.array_equal(scale.factor, expected.factor)


@pytest.mark.parametrize("reading", ["auto", "streamed"])
def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path, latents: LatentManifest, reading: str) -> None:
    config = trained_on(order="pooled", reading=reading)
    whole = tiny.run_train(tmp_path / "whole", trained_on(order="pooled"), latents)
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, config, latents, tiny.Killer(when=6))
    assert tiny.objects(tiny.run_train(tmp_path, config, latents)) == tiny.objects(whole)


def test_samples_of_a_killed_stage_are_the_same(tmp_path: Path, model: CheckpointManifest) -> None:
    whole = tiny.run_sample(tmp_path / "whole", tiny.SAMPLING, model)
    with pytest.raises(tiny.Killed):
        tiny.run_sample(tmp_path, tiny.SAMPLING, model, tiny.Killer(when=6))
    again = tiny.run_sample(tmp_path, tiny.SAMPLING, model)
    assert tiny.objects(again) == tiny.objects(whole)
    assert isinstance(again, SampleManifest)


def test_held_out_images_are_normalised_as_those_of_training(
    tmp_path: Path, shards: ShardManifest, vae: VaeRef
) -> None:
    """Not by statistics of their own."""
    encoding = tiny.encode_config(vae)
    held_out_latents = tiny.run_encode(tmp_path, held_out_config(encoding), shards)
    latents = tiny.run_encode(tmp_path, encoding, shards)
    config = trained_on(held_out=HeldOutLoss(images=3))
    plain = config.model_copy(update={"normalise": "scale"})
    measured, other = (open_held_out(each, card_for(each, latents), latents, Ranks()) for each in (config, plain))
    assert measured is not None and other is not None
    assert measured.conditions_digest != other.conditions_digest
    assert "channels" not in other.conditions
    draws = StepDraws(0, 0, range(3), latents.latent_shape)
    x0 = measured.data.x0(np.arange(3), np.zeros(3, np.bool_), draws)
    rows = RowReader(held_out_latents)
    z = [rows.take(name, np.arange(3), np.zeros(3, np.int64)).astype(np.float64) for name in ("mean", "std")]
    mean, deviation = (values[:, None, None] for values in numbers(latents, slice(0, 2)))
    np.testing.assert_allclose(x0, (z[0] + z[1] * draws.posterior.numpy() - mean) / deviation, rtol=1e-4, atol=1e-5)


def test_a_guide_on_another_scale_is_refused_and_one_on_a_planned_scale_is_not_yet(
    model: CheckpointManifest, checkpoint: CheckpointManifest
) -> None:
    config = tiny.SAMPLING.model_copy(update={"guide": model.uri})
    assert guide_of(config, model.card) == model
    assert guide_of(config, model.card.model_copy(update={"channels": PLANNED})) == model
    with pytest.raises(InputError, match="has mean of channel 0 -?[0-9.]+, and the model none"):
        guide_of(config, checkpoint.card)


@pytest.mark.parametrize("same", [False, True])
def test_weights_from_another_scale_are_said(
    model: CheckpointManifest, latents: LatentManifest, same: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = trained_on(init=Init(source=model.uri), normalise="channel" if same else "scale")
    with caplog.at_level(logging.WARNING):
        initial_state(config, card_for(config, latents), Ranks())
    assert ("was trained on latents of another scale (train.normalise)" in caplog.text) != same


@pytest.mark.parametrize(
    ("name", "layout"), [("x.pt", "reference"), ("x", "diffusers"), ("x", "pipeline"), ("x.safetensors", "reference")]
)
def test_only_the_record_of_a_converted_file_has_a_place_for_it(
    tmp_path: Path, model: CheckpointManifest, name: str, layout: Layout
) -> None:
    found = read(uri.redact(model.uri))
    assert found.channels == model.card.channels is not None
    if name == "x.safetensors":
        write(found, str(tmp_path / name), layout)
        assert read(str(tmp_path / name), heads=2).channels == model.card.channels
    else:
        with pytest.raises(InputError, match=f"{name}: its latents are normalised channel by channel, which only"):
            write(found, str(tmp_path / name), layout)
        assert not (tmp_path / name).exists()
