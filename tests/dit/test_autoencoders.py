"""Every class of autoencoder against diffusers' own encode and decode, by the way that its pipelines go."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE, AutoencoderTiny, VQModel
from torch import Tensor

from dit import autoencoders
from dit.convert import read, write
from dit.export import CheckpointManifest
from dit.train import card_for
from dit.vae import CONFIG, VaeRef, info, load_vae, packages, vae_inputs
from storage import uri
from storage.errors import InputError
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest

SIDE = 32


def kl() -> AutoencoderKL:
    """f16 with 32 channels, as VA-VAE."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(4,) * 5,
        norm_num_groups=2,
        latent_channels=32,
        layers_per_block=1,
        scaling_factor=1.5,
    )


def flux2() -> AutoencoderKLFlux2:
    model = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        latent_channels=6,
        layers_per_block=1,
        batch_norm_eps=0.01,
    )
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.1, 4)
    return model


def vq() -> VQModel:
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        num_vq_embeddings=32,
    )
    torch.nn.init.normal_(model.quantize.embedding.weight)  # far apart, or rounding decides
    return model


def dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
        decoder_block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
        encoder_block_out_channels=(8,) * 4 + (16,) * 2,
        decoder_block_out_channels=(8,) * 4 + (16,) * 2,
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        scaling_factor=0.41407,
    )


def taesd() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, latent_channels=16, shift_factor=0.0
    )


def rae() -> AutoencoderRAE:
    return AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        patch_size=16,
        encoder_input_size=28,
        latents_mean=torch.randn(64, 2, 2),
        latents_std=torch.rand(64, 2, 2) + 0.5,
        scaling_factor=1.3,
    )


def plain(model: Any, latents: Tensor) -> Tensor:
    return latents


def patched(model: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """As Flux 2's pipeline prepares latents of images, in the words of NumPy."""
    b, c, h, w = latents.shape
    patches = latents.numpy().reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 5, 2, 4)
    found = torch.from_numpy(patches.reshape(b, 4 * c, h // 2, w // 2).copy())
    mean, variance = model.bn.running_mean, model.bn.running_var
    return (found - mean.view(1, -1, 1, 1)) / torch.sqrt(variance.view(1, -1, 1, 1) + model.config.batch_norm_eps)


def unscaled(model: AutoencoderRAE, latents: Tensor) -> Tensor:
    return latents / model.config.scaling_factor


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    numbers: tuple[int, int, float]
    """Downsampling, channels, scaling factor."""
    latents: str
    """The field of the encoder's output."""
    pipeline: Callable[[Any, Tensor], Tensor] = plain
    """What a pipeline makes of the mean."""
    low: float = -1.0
    """What black is to the network."""


CASES = {
    "AutoencoderKL": Case(kl, (16, 32, 1.5), "latent_dist"),
    "AutoencoderKLFlux2": Case(flux2, (16, 24, 1.0), "latent_dist", patched),
    "VQModel": Case(vq, (2, 3, 0.18215), "latents"),
    "AutoencoderDC": Case(dc, (32, 8, 0.41407), "latent"),
    "AutoencoderTiny": Case(taesd, (8, 16, 1.0), "latents"),
    "AutoencoderRAE": Case(rae, (16, 64, 1.3), "latent", unscaled, low=0.0),
}


def made(case: Case, folder: Path) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.make().eval()
    model.save_pretrained(folder)
    return model


def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8))


def test_every_class_has_a_case() -> None:
    assert set(CASES) == set(autoencoders.AUTOENCODERS)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_as_in_diffusers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    reference = made(case, tmp_path)
    ours, found = load_vae(VaeRef(source=str(tmp_path))), info(VaeRef(source=str(tmp_path)))
    downsample, channels, factor = case.numbers
    for numbers in (found, ours):
        assert (numbers.downsample, numbers.channels) == (downsample, channels)
        assert (numbers.scaling_factor, numbers.shift_factor) == (factor, 0.0)
    given = images().permute(0, 3, 1, 2) / 255 * (1 - case.low) + case.low
    encoded = getattr(reference.encode(given), case.latents)
    raw = encoded.mean if case.latents == "latent_dist" else encoded
    expected = case.pipeline(reference, raw)
    mean, std = ours.encode(images())
    assert mean.shape == std.shape == (3, channels, SIDE // downsample, SIDE // downsample)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    if case.latents == "latent_dist":
        spread = case.pipeline(reference, raw + encoded.std) - expected
        torch.testing.assert_close(std, spread, rtol=1e-3, atol=1e-4)
    else:
        assert not std.any()
    decoded = ((reference.decode(raw).sample - case.low) / (1 - case.low)).permute(0, 2, 3, 1).double().numpy()
    exact = np.clip(255 * decoded + 0.5, 0, 255)
    found_images = ours.decode(mean * factor).numpy()
    assert exact.std() > 1
    assert np.abs(found_images - exact).max() <= 1.01


@pytest.mark.parametrize("name", CASES)
def test_another_factor_of_the_same_weights_is_another_input(name: str, tmp_path: Path) -> None:
    made(CASES[name], tmp_path)
    before = vae_inputs(VaeRef(source=str(tmp_path)))
    config = json.loads((tmp_path / CONFIG).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"scaling_factor": 0.7}))
    assert vae_inputs(VaeRef(source=str(tmp_path))) != before


@torch.no_grad()
def test_statistics_of_a_batch_norm_stay_exact_in_half_precision(tmp_path: Path) -> None:
    """Else images that are encoded in one precision and decoded in another would be shifted."""
    reference = made(CASES["AutoencoderKLFlux2"], tmp_path)
    half = load_vae(VaeRef(source=str(tmp_path)), dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert torch.equal(half.model.bn.running_mean, reference.bn.running_mean)
    mean, std = half.encode(images())
    assert mean.dtype == std.dtype == torch.float32
    full = load_vae(VaeRef(source=str(tmp_path))).encode(images())[0]
    torch.testing.assert_close(mean, full, rtol=0.1, atol=0.05)
    assert half.decode(mean).shape == (3, SIDE, SIDE, 3)


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"_class_name": "AutoencoderRAE"}))
    monkeypatch.setattr(autoencoders, "find_spec", lambda _: None)
    with pytest.raises(InputError) as caught:
        load_vae(VaeRef(source=str(tmp_path)))
    needs = "AutoencoderRAE needs transformers; pip install 'ditflow[rae]'"
    assert str(caught.value) == f"{tmp_path / CONFIG}: {needs}"
    monkeypatch.setattr(autoencoders, "find_spec", lambda name: name)
    assert packages(VaeRef(source=str(tmp_path))) == ["transformers"]
    (tmp_path / CONFIG).write_text(json.dumps({"_class_name": "AutoencoderDC"}))
    assert packages(VaeRef(source=str(tmp_path))) == []


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny"])
def test_latents_are_stored_trained_on_sampled_and_decoded(name: str, tmp_path: Path, shards: ShardManifest) -> None:
    """With normalised channels, as such latents need it."""
    folder, case = tmp_path / "vae", CASES[name]
    made(case, folder)
    ref = VaeRef(source=str(folder))
    latents = tiny.run_encode(tmp_path, tiny.encode_config(ref), shards)
    downsample, channels, _ = case.numbers
    assert latents.latent_shape == (channels, tiny.SIDE // downsample, tiny.SIDE // downsample)
    assert RowReader(latents).array("std").any() == (case.latents == "latent_dist")
    model = tiny.MODEL.model_copy(update={"patch_size": 1})
    config = tiny.TRAINING.model_copy(update={"normalise": "channel", "steps": 2, "model": model})
    checkpoint = tiny.run_train(tmp_path, config, latents)
    assert checkpoint.card.channels == card_for(config, latents).channels is not None
    samples = tiny.run_sample(tmp_path, tiny.SAMPLING.model_copy(update={"count": 3}), checkpoint)
    assert RowReader(samples).array("image").shape == (3, tiny.SIDE, tiny.SIDE, 3)


def test_a_pipeline_of_diffusers_decodes_with_one_class_alone(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    tiny_one = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
    )
    tiny_one.save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match="is an AutoencoderTiny, and this pipeline decodes with an AutoencoderKL"):
        write(read(uri.redact(checkpoint.uri)), str(tmp_path / "out"), "pipeline", vae=str(tmp_path / "vae"))


def test_one_size_of_images_is_refused_for_others(
    tmp_path: Path, shards: ShardManifest, checkpoint: CheckpointManifest
) -> None:
    made(CASES["AutoencoderRAE"], tmp_path / "vae")
    config = tiny.encode_config(VaeRef(source=str(tmp_path / "vae"))).model_copy(update={"resolution": 64})
    with pytest.raises(InputError, match="encode.resolution: this autoencoder takes images of 32 px alone"):
        tiny.run_encode(tmp_path, config, shards)
