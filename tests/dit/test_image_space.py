"""Models on pixels, from images to samples: no autoencoder anywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import dit
from dit.diffusion.config import DiffusionConfig, EDMConfig
from dit.diffusion.edm import EDM
from dit.export import CheckpointManifest
from dit.models.build import build
from dit.models.choice import DataSpec, DiffiTImageChoice, ImageShape
from dit.ranks import Ranks
from dit.sample import SampleManifest
from dit.samplers.config import SampleConfig
from dit.samplers.heun import heun
from dit.samplers.noise import SampleNoise
from dit.samplers.state import last
from dit.training.augment import augmented
from dit.training.config import TrainConfig
from dit.training.data import Batches, Pixels, open_data
from dit.training.draws import StepDraws
from storage.errors import InputError
from storage.images import transforms
from storage.latents import LatentManifest
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest, read_images
from storage.verify import faults

MODEL = DiffiTImageChoice(
    size=ImageShape(stem_width=32, widths=(32,), depths=(1,), window=4, time_width=32), conditional=True, dropout=0.2
)
TRAINING = TrainConfig(
    model=MODEL,
    diffusion=EDMConfig(),
    steps=6,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=4,
    gradient_clip=1.0,
    ema_decay=0.9,
    ema_ramp=0.5,
    augmentation=0.5,
    log_every=1,
    checkpoint_every=2,
)
SAMPLING = SampleConfig(
    count=5, labels="balanced", sampler="heun", steps=3, guidance_scale=1, batch_size=3, block_rows=4
)


@pytest.fixture(scope="module")
def pixels(root: Path, shards: ShardManifest) -> LatentManifest:
    return tiny.run_encode(root, tiny.encode_config(None), shards)


@pytest.fixture(scope="module")
def trained(root: Path, pixels: LatentManifest) -> CheckpointManifest:
    return tiny.run_train(root, TRAINING, pixels)


@pytest.fixture(scope="module")
def drawn(root: Path, trained: CheckpointManifest) -> SampleManifest:
    return tiny.run_sample(root, SAMPLING, trained)


def sampling(**fields: Any) -> SampleConfig:
    return SampleConfig.model_validate(SAMPLING.model_dump() | fields)


def test_pixels_are_the_crops(pixels: LatentManifest, shards: ShardManifest) -> None:
    stored = RowReader(pixels).array("image")
    expected = [transforms.load(sample.data, tiny.SIDE) for sample in read_images(shards, "train", 0, tiny.COUNT)]
    assert np.array_equal(stored, np.stack(expected))
    assert (pixels.vae, pixels.flips, pixels.latent_shape) == (None, 1, (3, tiny.SIDE, tiny.SIDE))
    assert pixels.metrics == {}
    assert Image.open(Path(pixels.uri, "artifacts/images.png")).width >= 8 * tiny.SIDE
    assert not faults(pixels, full=True)


def test_a_killed_run_goes_on_to_the_same_pixels(tmp_path: Path, pixels: LatentManifest, shards: ShardManifest) -> None:
    with pytest.raises(tiny.Killed):
        tiny.run_encode(tmp_path, tiny.encode_config(None), shards, tiny.Killer(20))
    assert tiny.objects(tiny.run_encode(tmp_path, tiny.encode_config(None), shards)) == tiny.objects(pixels)


def test_batches_are_scaled_pixels_and_their_mirror_images(pixels: LatentManifest) -> None:
    data = open_data(pixels)
    assert isinstance(data, Pixels)
    batches = Batches(data, pixels.latent_shape, 16, 0, True, 3, 0.0, Ranks(), torch.device("cpu"))
    stored = RowReader(pixels).array("image") / np.float32(127.5) - 1
    plain, mirrored = (list(images.transpose(0, 3, 1, 2)) for images in (stored, stored[:, :, ::-1]))
    seen = {"plain": 0, "mirrored": 0}
    for x0 in batches(0).x0.numpy():
        seen["plain"] += any(np.array_equal(x0, image) for image in plain)
        seen["mirrored"] += any(np.array_equal(x0, image) for image in mirrored)
    assert min(seen.values()) >= 3
    assert sum(seen.values()) == 16


def test_a_distorted_batch_says_how(pixels: LatentManifest) -> None:
    data, rest = open_data(pixels), (pixels.latent_shape, 16, 0, False, 3, 0.0, Ranks(), torch.device("cpu"))
    plain, moved = Batches(data, *rest)(3), Batches(data, *rest, augmentation=0.3)(3)
    assert plain.augment is None
    assert moved.augment is not None
    x0, labels = augmented(plain.x0, StepDraws(0, 3, range(16), pixels.latent_shape).augment, 0.3)
    assert torch.equal(moved.x0, x0)
    assert torch.equal(moved.augment, labels)
    assert torch.equal(moved.noise, plain.noise)
    halves = [
        Batches(data, pixels.latent_shape, 16, 0, False, 3, 0.0, Ranks(rank, 2), torch.device("cpu"), 0.3)(3).x0
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(halves), moved.x0)


def test_latents_are_not_distorted(tmp_path: Path, latents: LatentManifest) -> None:
    with pytest.raises(InputError, match=r"train.augmentation: works on pixels, and the data are latents"):
        tiny.run_train(tmp_path, TRAINING.model_copy(update={"model": MODEL}), latents)


def test_the_card_says_that_it_works_on_pixels(trained: CheckpointManifest) -> None:
    card = trained.card
    assert (card.vae, card.vae_ref, card.diffusion) == (None, None, EDMConfig())
    assert (card.model.kind, card.model.input_size, card.model.num_classes) == ("diffit_image", tiny.SIDE, 3)
    assert set(trained.metrics) == {"final_loss", "final_mse", "final_gradient_norm"}


@pytest.mark.parametrize("when", [3, 5])
def test_training_with_dropout_goes_on_to_the_same_bits(
    tmp_path: Path, pixels: LatentManifest, trained: CheckpointManifest, when: int
) -> None:
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, TRAINING, pixels, tiny.Killer(when))
    assert tiny.objects(tiny.run_train(tmp_path, TRAINING, pixels)) == tiny.objects(trained)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_drop_and_distort_the_same(
    tmp_path: Path, pixels: LatentManifest, trained: CheckpointManifest, micro_batch: int
) -> None:
    again = tiny.run_train(tmp_path, TRAINING.model_copy(update={"micro_batch": micro_batch}), pixels)
    assert again.digest == trained.digest
    assert again.metrics == pytest.approx(trained.metrics, rel=1e-5)


def test_weights_are_those_of_adam_on_the_published_sum_of_the_loss(tmp_path: Path, pixels: LatentManifest) -> None:
    """EDM sums the loss over an image's numbers, so Adam's eps weighs less than against their mean."""
    choice = MODEL.model_copy(update={"dropout": 0.0, "label_dropout": 0.0})
    config = TrainConfig(model=choice, diffusion=EDMConfig(), steps=4, batch_size=4, learning_rate=1e-3, flips=False)
    trained = dit.load(tiny.run_train(tmp_path, config, pixels).uri, weights="model-raw.safetensors").model
    torch.manual_seed(config.seed)
    model, process = build(choice.config(DataSpec(3, tiny.SIDE, 3, learn_variance=False))), EDM.from_config(EDMConfig())
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate, eps=1e-8)
    batches = Batches(
        open_data(pixels), pixels.latent_shape, 4, config.seed, False, 3, 0.0, Ranks(), torch.device("cpu")
    )
    for step in range(config.steps):
        batch = batches(step)
        sigma = process.sample_t(batch.u)
        scale = sigma.float()[:, None, None, None]
        error = process.denoise(model, batch.x0 + scale * batch.noise, sigma, batch.y) - batch.x0
        optimizer.zero_grad()
        ((scale**2 + 0.25) / (0.5 * scale) ** 2 * error**2).sum().div(4).backward()
        optimizer.step()
    expected = dict(model.named_parameters())
    for name, weight in trained.named_parameters():
        if (
            "qkv" not in name
        ):  # the softmax does not see the keys' biases: their gradient is rounding, which Adam blows up
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_dropout_matters(tmp_path: Path, pixels: LatentManifest, trained: CheckpointManifest) -> None:
    without = TRAINING.model_copy(update={"model": MODEL.model_copy(update={"dropout": 0.0})})
    assert tiny.run_train(tmp_path, without, pixels).metrics != trained.metrics


def test_samples_are_heuns_last_state_as_bytes(drawn: SampleManifest, trained: CheckpointManifest) -> None:
    model, process = dit.load(trained.uri).model, EDM.from_config(EDMConfig())
    noise = SampleNoise(0, range(5), (3, tiny.SIDE, tiny.SIDE))
    x0 = last(heun(process, model, noise.initial(), torch.arange(5) % 3, steps=3))
    expected = (x0 * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = RowReader(drawn).array("image")
    assert (np.abs(found.astype(int) - expected) <= 1).all()
    assert drawn.resolution == tiny.SIDE


def test_rounding_down_makes_about_half_of_the_numbers_one_level_darker(
    tmp_path: Path, drawn: SampleManifest, trained: CheckpointManifest
) -> None:
    down = tiny.run_sample(tmp_path, sampling(rounding="down"), trained)
    darker = RowReader(drawn).array("image").astype(int) - RowReader(down).array("image")
    assert set(np.unique(darker)) == {0, 1}
    inside = RowReader(down).array("image") % 255 != 0  # of what is clamped, nothing becomes darker
    assert 0.4 < darker[inside].mean() < 0.6
    assert down.conditions["rounding"] == "down"


def test_conditions_are_those_that_bear_on_the_images(drawn: SampleManifest) -> None:
    assert drawn.conditions == {
        "count": 5,
        "labels": "balanced",
        "sampler": "heun",
        "steps": 3,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "rho": 7.0,
        "guidance_scale": 1.0,
        "rounding": "nearest",
        "weights": "ema",
        "precision": "float32",
        "seed": 0,
        "training_steps": 6,
    }


def test_guidance_within_an_interval_of_noise_levels(tmp_path: Path, trained: CheckpointManifest) -> None:
    def images(name: str, **fields: Any) -> np.ndarray:
        return RowReader(tiny.run_sample(tmp_path / name, sampling(**fields), trained)).array("image")

    unguided, guided = images("1", guidance_scale=1), images("2", guidance_scale=4)
    assert not np.array_equal(unguided, guided)
    assert np.array_equal(images("3", guidance_scale=4, guidance_interval=(0.002, 80)), guided)
    assert np.array_equal(images("4", guidance_scale=4, guidance_interval=(0.0, 0.001)), unguided)
    partly = tiny.run_sample(tmp_path / "5", sampling(guidance_scale=4, guidance_interval=(0.0, 10)), trained)
    assert partly.conditions["guidance_interval"] == "0 to 10"
    assert not np.array_equal(RowReader(partly).array("image"), guided)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sampler": "ddpm"}, "sample.sampler: ddpm does not fit the model's process; use heun"),
        ({"guidance_schedule": "power_cosine"}, "power_cosine needs timesteps"),
        ({"steps": 2, "sigma_min": 90.0}, "noise levels: sigma_max 80, sigma_min 90"),
    ],
)
def test_what_does_not_fit_the_process_is_refused(
    tmp_path: Path, trained: CheckpointManifest, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        tiny.run_sample(tmp_path, sampling(**fields), trained)


def test_a_decoder_is_refused(tmp_path: Path, trained: CheckpointManifest, vae: object) -> None:
    with pytest.raises(InputError, match="works on pixels and needs no decoder"):
        tiny.run_sample(tmp_path, sampling(vae=vae), trained)


def test_heun_does_not_fit_a_model_of_timesteps(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    with pytest.raises(InputError, match="heun does not fit the model's process; use ddpm, ddim or dpm"):
        tiny.run_sample(tmp_path, SAMPLING, checkpoint)


def test_the_u_also_learns_noise_by_timesteps(tmp_path: Path, pixels: LatentManifest) -> None:
    config = TRAINING.model_copy(update={"diffusion": DiffusionConfig(), "steps": 2})
    manifest = tiny.run_train(tmp_path, config, pixels)
    samples = tiny.run_sample(tmp_path, sampling(sampler="ddim", eta=0.5), manifest)
    assert samples.conditions["eta"] == 0.5
    assert "rho" not in samples.conditions
