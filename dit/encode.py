"""Images to latents: the posterior of the autoencoder for every image and its mirror image.

For models on pixels, to cropped images instead.
"""

# B = batch, F = flips, H = image side, C = latent channels, h = latent side

import math
from collections.abc import Iterator
from concurrent.futures import Executor
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from dit.devices import Precision, device, dtype
from dit.vae import Vae, VaeRef, load_vae
from storage import transforms
from storage.config import Config, operational
from storage.errors import DitflowError, InputError
from storage.latents import LatentManifest, VaeInfo, latent_layout, pixel_layout
from storage.manifest import FileEntry, StageOutput
from storage.parallel import threads
from storage.pictures import image_grid
from storage.rows import RowLayout, RowWriter, gathered
from storage.shards import Sample, ShardManifest, read_images
from storage.tracking import Tracker, publish

VERSION = 1
PICTURES = 32


class EncodeConfig(Config):
    """How images become latents."""

    vae: VaeRef | None
    """The autoencoder; null keeps the pixels, for models that work on images."""
    resolution: int = Field(256, ge=8)
    """Side of the square that an image is cropped to, in pixels."""
    split: str = "train"
    """Which part of the data set to encode."""
    flips: bool = True
    """Also encode every image mirrored: the latent of a mirrored image is not the mirrored latent. Not for pixels."""
    precision: Precision = "float32"
    """Arithmetic of the autoencoder. bfloat16 moves the means by about 1 % of their deviation."""
    batch_size: int = Field(64, ge=1)
    """Images in one pass of the autoencoder."""
    block_rows: int = Field(4096, ge=1)
    """Latents in one object of the store, the unit of work and resume."""
    chunk_rows: int = Field(256, ge=1)
    """Latents in one chunk of an object, the unit of reading."""
    threads: int = operational(0, ge=0)
    """Threads that decode images; 0 means one for each core."""


def run(config: EncodeConfig, shards: ShardManifest, *, out: StageOutput, tracker: Tracker) -> LatentManifest:
    """Encode what is not encoded yet, block by block, and commit the latents.

    Raises:
        InputError: the resolution does not fit the autoencoder, or the split is not there.
        StorageError: a tar is not what was committed, or the disk is full.
        DitflowError: the autoencoder's latents are not finite.
    """
    if config.split not in shards.splits:
        raise InputError(f"encode.split: {config.split!r} is not in the data; it has {', '.join(shards.splits)}")
    vae = load_vae(config.vae, device(), dtype(config.precision)) if config.vae else None
    rows = shards.splits[config.split].count
    shape, flips = _shape(config, vae), 2 if config.flips and vae else 1
    writer = RowWriter(out, _layout(config, rows, flips, shape, vae), _attributes(config, vae))
    for block in writer.missing():
        start, stop = writer.bounds(block)
        parts = _encoded(config, vae, shards, start, stop)
        writer.write(block, gathered(parts, tracker, start=start, total=rows, unit="images"))
    picture, metrics = _picture(config, vae, shards, out, tracker)
    return out.commit(
        LatentManifest,
        [*writer.finish(), picture],
        counts={"images": rows},
        metrics=metrics,
        resolution=config.resolution,
        split=config.split,
        flips=flips,
        latent_shape=shape,
        class_names=shards.class_names,
        vae=_vae_info(config.vae, vae) if config.vae and vae else None,
    )


def _shape(config: EncodeConfig, vae: Vae | None) -> tuple[int, int, int]:
    """(C, h, h) of a latent, or of the pixels."""
    if vae is None:
        return 3, config.resolution, config.resolution
    if config.resolution % vae.downsample:
        raise InputError(f"encode.resolution: {config.resolution} px is not a multiple of the VAE's {vae.downsample}")
    side = config.resolution // vae.downsample
    return vae.channels, side, side


def _layout(config: EncodeConfig, rows: int, flips: int, shape: tuple[int, int, int], vae: Vae | None) -> RowLayout:
    if vae is None:
        return pixel_layout(rows, config.resolution, config.block_rows, config.chunk_rows)
    return latent_layout(rows, flips, shape, config.block_rows, config.chunk_rows)


def _encoded(
    config: EncodeConfig, vae: Vae | None, shards: ShardManifest, start: int, stop: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """The rows ``start`` to ``stop`` of the store, a batch at a time."""
    for batch, images in _batches(config, shards, start, stop):
        made = _moments(vae, images, config.flips) if vae else {"image": images.numpy()}
        yield made | _keys(batch)


def _batches(
    config: EncodeConfig, shards: ShardManifest, start: int, stop: int
) -> Iterator[tuple[list[Sample], torch.Tensor]]:
    """Images ``start`` to ``stop`` of the split, a batch at a time, with their pixels uint8 (B, H, H, 3)."""
    samples = read_images(shards, config.split, start, stop)
    with threads(config.threads) as pool:
        while batch := list(islice(samples, config.batch_size)):
            yield batch, _pixels(pool, batch, config.resolution)


def _pixels(pool: Executor, batch: list[Sample], resolution: int) -> torch.Tensor:
    images = pool.map(lambda sample: transforms.load(sample.data, resolution), batch)
    return torch.from_numpy(np.stack(list(images)))


def _keys(batch: list[Sample]) -> dict[str, NDArray[Any]]:
    return {
        "label": np.array([sample.label for sample in batch], np.int32),
        "source_index": np.array([sample.source_index for sample in batch], np.int64),
    }


def _moments(vae: Vae, images: torch.Tensor, flips: bool) -> dict[str, NDArray[Any]]:
    """Mean and standard deviation, float16 (B, F, C, h, h), of images (B, H, H, 3)."""
    views = [images, images.flip(2)] if flips else [images]
    moments = [vae.encode(view) for view in views]
    mean, std = (torch.stack(part, 1).half() for part in zip(*moments, strict=True))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise DitflowError("encode: the autoencoder's latents are not finite in float16; look at its weights")
    return {"mean": mean.cpu().numpy(), "std": std.cpu().numpy()}


def _vae_info(ref: VaeRef, vae: Vae) -> VaeInfo:
    return VaeInfo(
        source=ref.source,
        sha256=vae.sha256,
        downsample=vae.downsample,
        channels=vae.channels,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
    )


def _attributes(config: EncodeConfig, vae: Vae | None) -> dict[str, Any]:
    preprocessing = {"preprocessing": f"{transforms.CROP_ID}-{config.resolution}"}
    if vae is None:
        return {"range": [0, 255], **preprocessing}
    return {
        "vae_sha256": vae.sha256,
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor,
        "scaled": False,
        "input_range": [-1.0, 1.0],
        **preprocessing,
        "precision": config.precision,
    }


def _picture(
    config: EncodeConfig, vae: Vae | None, shards: ShardManifest, out: StageOutput, tracker: Tracker
) -> tuple[FileEntry, dict[str, float]]:
    """A picture of the first images, each beside what an autoencoder leaves of it, and the PSNR of those in dB."""
    batches = _batches(config, shards, 0, PICTURES)
    if vae is None:
        images = torch.cat([images for _, images in batches])
        return publish(out, tracker, "images.png", image_grid(images.numpy(), columns=8, gap=2)), {}
    pairs = torch.cat([_with_decoded(vae, images) for _, images in batches])
    error = (pairs[:, 0].double() - pairs[:, 1].double()).square().mean().item()
    picture = image_grid(pairs.flatten(0, 1).numpy(), columns=8, gap=2)
    psnr = 10 * math.log10(255**2 / max(error, 1e-12))
    return publish(out, tracker, "reconstructions.png", picture), {"reconstruction_psnr_db": psnr}


def _with_decoded(vae: Vae, images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (B, H, H, 3) with what the autoencoder makes of them, (B, 2, H, H, 3)."""
    mean, _ = vae.encode(images)
    return torch.stack([images, vae.decode((mean - vae.shift_factor) * vae.scaling_factor).cpu()], 1)
