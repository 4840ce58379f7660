"""Stores of made-up numbers: no pictures, no autoencoder, the same on every machine."""

from pathlib import Path

import numpy as np
import tiny
from numpy.typing import NDArray

from dit.random import Stream, uniforms
from storage.config import Config
from storage.latents import LatentManifest, VaeInfo, latent_layout, pixel_layout
from storage.rows.store import RowLayout, RowWriter

ROWS, CLASSES = 24, ("a", "b", "c")
LATENT, PIXELS = (4, 8, 8), (3, 16, 16)
VAE = VaeInfo(source="nowhere", sha256="0" * 64, downsample=8, channels=4, scaling_factor=0.5)


def latents(root: Path) -> LatentManifest:
    """Latents of images and their mirror images."""
    mean, std = _uniform(0, 2, *LATENT), _uniform(1, 2, *LATENT)
    arrays = {"mean": (4 * mean - 2).astype(np.float16), "std": (std / 4).astype(np.float16)}
    layout = latent_layout(ROWS, 2, LATENT, block_rows=16, chunk_rows=8)
    return _store(root / "latents", layout, arrays, vae=VAE, flips=2, latent_shape=LATENT, resolution=64)


def pixels(root: Path) -> LatentManifest:
    """Images of noise."""
    channels, side, _ = PIXELS
    arrays = {"image": (256 * _uniform(2, side, side, channels)).astype(np.uint8)}
    layout = pixel_layout(ROWS, side, block_rows=16, chunk_rows=8)
    return _store(root / "pixels", layout, arrays, vae=None, flips=1, latent_shape=PIXELS, resolution=side)


def _uniform(what: int, *shape: int) -> NDArray[np.float64]:
    numbers = uniforms(what, Stream.SAMPLE_INITIAL, 0, range(ROWS), int(np.prod(shape)))
    return numbers.reshape(ROWS, *shape)


def _store(root: Path, layout: RowLayout, arrays: dict[str, NDArray[np.generic]], **fields: object) -> LatentManifest:
    out = tiny.output(root, LatentManifest, Config())
    keys = {"label": np.arange(ROWS, dtype=np.int32) % len(CLASSES), "source_index": np.arange(ROWS)}
    writer = RowWriter(out, layout, {})
    for block in writer.missing():
        begin, end = writer.bounds(block)
        writer.write(block, {name: values[begin:end] for name, values in (arrays | keys).items()})
    counts = {"images": ROWS}
    return out.commit(LatentManifest, writer.finish(), counts=counts, split="train", class_names=CLASSES, **fields)
