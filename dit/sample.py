"""A checkpoint to images: guided samples, decoded, in a store that resumes block by block."""

# B = batch, C = latent channels, h = latent side, H = image side

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from dit.devices import Precision, device, dtype
from dit.diffusion.gaussian import GaussianDiffusion
from dit.export import EMA_WEIGHTS, RAW_WEIGHTS, CheckpointManifest, ModelCard, Trained, load
from dit.samplers.ddim import ddim
from dit.samplers.ddpm import ddpm
from dit.samplers.guidance import Channels, Guided
from dit.samplers.noise import SampleNoise
from dit.samplers.state import last
from dit.vae import Vae, VaeRef, load_vae
from storage.config import Config, operational
from storage.errors import DitflowError, InputError
from storage.manifest import Manifest, StageOutput
from storage.pictures import image_grid
from storage.rows import ArraySpec, RowLayout, RowWriter, gathered
from storage.tracking import Tracker, publish

VERSION = 1
PICTURE = "samples.png"


class SampleConfig(Config):
    """How samples are drawn from a trained model."""

    count: int = Field(50_000, ge=1)
    """Images to make."""
    labels: Literal["balanced", "random"] = "random"
    """Every class in turn, or each class as likely as the others."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Ancestral with the learned variance, or deterministic."""
    steps: int = Field(250, ge=2)
    """Network evaluations for one image, of a process with that many steps or more."""
    guidance_scale: float = Field(1.5, ge=0)
    """Classifier-free guidance; 1 is none. An unconditional model is never guided."""
    guidance_channels: Channels = "first3"
    """Latent channels to guide: the first three, as in the published results, or all."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the weights, or those of the last step."""
    vae: VaeRef | None = operational(None)
    """Another decoder than the autoencoder that made the latents."""
    precision: Precision = "float32"
    """Arithmetic of model and decoder."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides noise and random labels; sample i depends on (seed, i) alone."""
    batch_size: int = Field(128, ge=1)
    """Images in one pass of the sampler."""
    block_rows: int = Field(1024, ge=1)
    """Images in one object of the store, the unit of work and resume."""


class SampleManifest(Manifest):
    """Generated images uint8 (H, H, 3) and their labels, -1 where there are none, in a row store."""

    STAGE = "sample"

    resolution: int
    """Side of the images, in pixels."""
    class_names: tuple[str, ...]
    """The classes; a label is a position here."""
    conditions: dict[str, str | int | float]
    """What a number computed from these samples must be published with."""


def run(config: SampleConfig, checkpoint: CheckpointManifest, *, out: StageOutput, tracker: Tracker) -> SampleManifest:
    """Make the samples that are not made yet, block by block, and commit them.

    Raises:
        InputError: decoder or steps do not fit the model, or a file is missing, broken or altered.
        StorageError: the disk is full.
        DitflowError: the model's samples are not finite.
    """
    vae = load_vae(config.vae or checkpoint.vae_ref, device(), dtype(config.precision))
    trained = load(checkpoint.uri, weights=EMA_WEIGHTS if config.weights == "ema" else RAW_WEIGHTS, device=device())
    card = trained.card
    _check(vae, card)
    writer = RowWriter(out, layout(config.count, config.block_rows, card.resolution), {"range": [0, 255]})
    for block in writer.missing():
        start, stop = writer.bounds(block)
        parts = generate(config, trained, vae, start, stop)
        rows = gathered(parts, tracker, start=start, total=config.count, unit="images")
        if block == 0:  # before the block is committed, so whoever resumes finds the picture there
            publish(out, tracker, PICTURE, _picture(rows["image"], card))
        writer.write(block, rows)
    return out.commit(
        SampleManifest,
        [*writer.finish(), out.describe(f"artifacts/{PICTURE}")],
        counts={"images": config.count},
        resolution=card.resolution,
        class_names=card.class_names,
        conditions=_conditions(config, card, vae),
    )


def generate(
    config: SampleConfig, trained: Trained, vae: Vae, start: int, stop: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """Samples ``start`` to ``stop``, a batch at a time: image uint8 (B, H, H, 3) and label int32 (B,)."""
    for first in range(start, stop, config.batch_size):
        indices = range(first, min(first + config.batch_size, stop))
        labels = _labels(config, indices, trained.card.model.num_classes)
        yield {"image": draw(config, trained, vae, indices, labels), "label": labels.numpy().astype(np.int32)}


def draw(config: SampleConfig, trained: Trained, vae: Vae, indices: range, labels: torch.Tensor) -> NDArray[np.uint8]:
    """The images uint8 (B, H, H, 3) of the samples with these indices and labels (B,).

    Args:
        config: how to draw them; its count and labels do not matter.
        trained: the model.
        vae: decodes the latents, unscaled as the model's card says.
        indices: numbers of the samples in the whole set: the noise of each depends on seed and number alone.
        labels: a class for each; not looked at if the model is unconditional.

    Raises:
        InputError: the process has no such number of steps.
        DitflowError: the samples are not finite.
    """
    model = trained.card.model
    process = GaussianDiffusion.from_config(trained.card.diffusion).respaced(config.steps).to(device())
    noise = SampleNoise(config.seed, indices, (model.in_channels, model.input_size, model.input_size), device())
    y = labels.to(device()) if model.num_classes else None
    scale = config.guidance_scale if model.num_classes else 1.0
    guided = Guided(trained.model, scale, model.num_classes, config.guidance_channels)
    sampler = {"ddpm": ddpm, "ddim": ddim}[config.sampler]
    with torch.autocast(device().type, dtype(config.precision), enabled=config.precision != "float32"):
        latents = last(sampler(process, guided, noise.initial(), y, noise))
    if not latents.isfinite().all():
        raise DitflowError(
            f"samples {indices[0]:,} to {indices[-1]:,} are not finite; look at the model's training loss"
        )
    scales = trained.card.vae
    decoder = replace(vae, scaling_factor=scales.scaling_factor, shift_factor=scales.shift_factor)
    return decoder.decode(latents).cpu().numpy()


def layout(count: int, block_rows: int, resolution: int) -> RowLayout:
    """A row store of labelled images."""
    chunk = gcd(block_rows, 2**20 // resolution**2 or 1)  # at most 3 MiB
    image = ArraySpec("image", "uint8", (resolution, resolution, 3), chunk)
    return RowLayout(count, block_rows, (image, ArraySpec("label", "int32", (), block_rows)))


def _labels(config: SampleConfig, indices: range, num_classes: int) -> torch.Tensor:
    if num_classes == 0:
        return torch.full((len(indices),), -1)
    if config.labels == "balanced":
        return torch.tensor([index % num_classes for index in indices])
    return SampleNoise(config.seed, indices, (1, 1, 1)).labels(num_classes)


def _check(vae: Vae, card: ModelCard) -> None:
    """See that the decoder fits the model."""
    hint = "give the one that the latents were made with, or a decoder of the same latents"
    if vae.channels != card.model.in_channels:
        channels = f"the autoencoder has {vae.channels} latent channels and the model {card.model.in_channels}"
        raise InputError(f"sample.vae: {channels}; {hint}")
    side = card.model.input_size * vae.downsample
    if side != card.resolution:
        raise InputError(f"sample.vae: the autoencoder makes images of {side} px, not of {card.resolution}; {hint}")


def _conditions(config: SampleConfig, card: ModelCard, vae: Vae) -> dict[str, str | int | float]:
    conditions: dict[str, str | int | float] = config.model_dump(exclude={"vae", "batch_size", "block_rows"})
    conditions |= {"decoder_sha256": vae.sha256, "training_steps": card.steps}
    if card.model.num_classes == 0:
        conditions |= {"labels": "none", "guidance_scale": 1.0}
    return conditions


def _picture(images: NDArray[np.uint8], card: ModelCard) -> bytes:
    """The first images in eight rows; with few classes a balanced set shows one in each column."""
    columns = len(card.class_names) if card.model.num_classes and len(card.class_names) <= 16 else 8
    return image_grid(images[: 8 * columns], columns=columns, gap=2)
