"""What models are trained on, at rest: latents, or the pixels themselves.

A latent is the posterior's mean and standard deviation, as the VAE gives them. Both are stored
unscaled; training draws mean + std * noise afresh and then scales.
"""

# N = images, B = images asked for, F = flips (plain; then mirrored), C = channels, h, w = latent side, H = image side

from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from storage import uri
from storage.config import Config, operational
from storage.errors import InputError
from storage.manifest import Manifest
from storage.rows.store import ArraySpec, RowLayout, RowReader


class VaeInfo(Config):
    """The network that made the latents, and how its numbers are scaled."""

    source: Annotated[str, AfterValidator(uri.redact)] = operational()
    """Where its weights lie: a hub id, a folder or a URL."""
    sha256: str
    """Hash of the weights file."""
    downsample: int
    """Image pixels to a latent pixel, along a side."""
    channels: int
    """Latent channels."""
    scaling_factor: float
    """What latents are multiplied by, after the shift, before a model sees them."""
    shift_factor: float = 0.0
    """What is subtracted from latents first."""


class LatentManifest(Manifest):
    """The images of one split as latents, or as pixels for models that need no autoencoder."""

    STAGE: ClassVar[str] = "encode"

    resolution: int
    """Side of the images that were encoded, pixels."""
    split: str
    """The split of the shards: ``train`` or ``held_out``."""
    flips: int
    """1: images as they are; 2: also mirrored left to right. Pixels are stored once and mirrored when read."""
    latent_shape: tuple[int, int, int]
    """(C, h, w); for pixels (3, H, H)."""
    class_names: tuple[str, ...]
    """The classes; a label is a position here."""
    vae: VaeInfo | None
    """None if these are pixels."""

    @property
    def count(self) -> int:
        """How many images."""
        return self.counts["images"]


def latent_layout(
    rows: int, flips: int, shape: tuple[int, int, int], block_rows: int = 4096, chunk_rows: int = 256
) -> RowLayout:
    """The arrays of a latent store: ``mean``, ``std`` (N, F, C, h, w) float16, ``label`` int32, ``source_index`` int64.

    Args:
        rows: images.
        flips: 1 or 2.
        shape: (C, h, w).
        block_rows: images of a block, the unit that is committed.
        chunk_rows: images of an inner chunk, the unit that is checksummed and fetched.

    Raises:
        InputError: block_rows is no multiple of chunk_rows.
    """
    moments = [
        ArraySpec(name, "float16", (flips, *shape), chunk_rows=chunk_rows, split_axis0=True) for name in ("mean", "std")
    ]
    return RowLayout(rows=rows, block_rows=block_rows, arrays=(*moments, *_keys(chunk_rows)))


def pixel_layout(rows: int, side: int, block_rows: int = 4096, chunk_rows: int = 256) -> RowLayout:
    """The arrays of a pixel store: ``image`` (N, H, H, 3) uint8, ``label`` int32, ``source_index`` int64.

    Args:
        rows: images.
        side: H.
        block_rows: images of a block, the unit that is committed.
        chunk_rows: images of an inner chunk, the unit that is checksummed and fetched.

    Raises:
        InputError: block_rows is no multiple of chunk_rows.
    """
    image = ArraySpec("image", "uint8", (side, side, 3), chunk_rows=chunk_rows)
    return RowLayout(rows=rows, block_rows=block_rows, arrays=(image, *_keys(chunk_rows)))


def _keys(chunk_rows: int) -> list[ArraySpec]:
    kinds = (("label", "int32"), ("source_index", "int64"))
    return [ArraySpec(name, dtype, (), chunk_rows=chunk_rows) for name, dtype in kinds]


class LatentReader:
    """Random access to the latents of a store.

    Args:
        manifest: of the store.
        cache: as of `RowReader`.
        streamed: as of `RowReader`.

    Raises:
        InputError: the store holds pixels.
        StorageError: as `RowReader`.
    """

    def __init__(self, manifest: LatentManifest, cache: Path | None = None, *, streamed: bool = False) -> None:
        if manifest.vae is None:
            raise InputError(f"{manifest.url}: holds pixels and no latents")
        self.vae = manifest.vae
        self._rows = RowReader(manifest, cache, streamed=streamed)
        self.chunk_rows = self._rows.chunk_rows("mean")
        self.labels: NDArray[np.int32] = self._rows.array("label")

    def expect(self, indices: NDArray[np.int64], flips: NDArray[np.int64]) -> None:
        """Say which images ``indices`` (B,), at which ``flips`` (B,), will be asked for next, as `RowReader.expect`."""
        for name in ("mean", "std"):
            self._rows.expect(name, indices, flips)

    def moments(
        self, indices: NDArray[np.int64], flips: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Mean and standard deviation, unscaled.

        Args:
            indices: (B,) images.
            flips: (B,) 0 for the image as it is, 1 for its mirror; all 0 by default.

        Returns:
            Two arrays (B, C, h, w) float16.

        Raises:
            IndexError: an image or flip that the store does not have.
        """
        flips = np.zeros(len(indices), np.int64) if flips is None else flips
        return self._rows.take("mean", indices, flips), self._rows.take("std", indices, flips)


class PixelReader:
    """Random access to the images of a store of pixels.

    Args:
        manifest: of the store.
        cache: as of `RowReader`.
        streamed: as of `RowReader`.

    Raises:
        StorageError: as `RowReader`.
    """

    def __init__(self, manifest: LatentManifest, cache: Path | None = None, *, streamed: bool = False) -> None:
        self._rows = RowReader(manifest, cache, streamed=streamed)
        self.chunk_rows = self._rows.chunk_rows("image")
        self.labels: NDArray[np.int32] = self._rows.array("label")

    def expect(self, indices: NDArray[np.int64]) -> None:
        """Say which images ``indices`` (B,) will be asked for next, as `RowReader.expect`."""
        self._rows.expect("image", indices)

    def images(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images (B, H, H, 3) of ``indices`` (B,).

        Raises:
            IndexError: an image that the store does not have.
        """
        return self._rows.take("image", indices)
