"""Stored training data: latents of an autoencoder, or pixels.

A latent is stored as mean and standard deviation of the autoencoder's posterior, both unscaled. At
each use, training draws mean + std * noise with new noise and then scales it.
"""

# N = images, B = images asked for, F = flips (0: as it is, 1: mirrored), C = channels
# h, w = sides of a latent, H = side of an image, pixels

from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from storage import uri
from storage.config import Config, operational
from storage.errors import InputError
from storage.manifest import Manifest
from storage.rows.format import stored_arrays
from storage.rows.staging import to_copy
from storage.rows.store import ArraySpec, RowLayout, RowReader


class VaeInfo(Config):
    """The autoencoder that made the latents, and the scale of its latents."""

    source: Annotated[str, AfterValidator(uri.redact)] = operational()
    """Location of its weights: a hub id, a folder or a URL."""
    sha256: str
    """SHA-256 of the weights file."""
    downsample: int
    """Image pixels for each latent pixel, along a side."""
    channels: int
    """Latent channels."""
    scaling_factor: float
    """Factor that latents are multiplied by, after the shift, before a model sees them."""
    shift_factor: float = 0.0
    """Value that is subtracted from latents before they are scaled."""


class LatentManifest(Manifest):
    """The images of one split as latents, or as pixels for models without an autoencoder."""

    STAGE: ClassVar[str] = "encode"

    resolution: int
    """Side of the encoded images, pixels."""
    split: str
    """The split of the shards: ``train`` or ``held_out``."""
    flips: int
    """1: images as they are; 2: mirrored left to right as well. Pixels are stored once and mirrored when read."""
    latent_shape: tuple[int, int, int]
    """(C, h, w); for pixels (3, H, H)."""
    class_names: tuple[str, ...]
    """Names of the classes; a label is an index into them."""
    vae: VaeInfo | None
    """The autoencoder; None for pixels."""

    @property
    def count(self) -> int:
        """Number of images."""
        return self.counts["images"]


def latent_layout(
    rows: int, flips: int, shape: tuple[int, int, int], block_rows: int = 4096, chunk_rows: int = 256
) -> RowLayout:
    """The arrays of a latent store: ``mean``, ``std`` (N, F, C, h, w) float16, ``label`` int32, ``source_index`` int64.

    Args:
        rows: N.
        flips: F, 1 or 2.
        shape: (C, h, w).
        block_rows: images of a block, the unit that is committed.
        chunk_rows: images of an inner chunk, the unit that is checksummed and fetched.

    Raises:
        InputError: block_rows is not a multiple of chunk_rows.
    """
    moments = [
        ArraySpec(name, "float16", (flips, *shape), chunk_rows=chunk_rows, split_axis0=True) for name in ("mean", "std")
    ]
    return RowLayout(rows=rows, block_rows=block_rows, arrays=(*moments, *_keys(chunk_rows)))


def pixel_layout(rows: int, side: int, block_rows: int = 4096, chunk_rows: int = 256) -> RowLayout:
    """The arrays of a pixel store: ``image`` (N, H, H, 3) uint8, ``label`` int32, ``source_index`` int64.

    Args:
        rows: N.
        side: H.
        block_rows: images of a block, the unit that is committed.
        chunk_rows: images of an inner chunk, the unit that is checksummed and fetched.

    Raises:
        InputError: block_rows is not a multiple of chunk_rows.
    """
    image = ArraySpec("image", "uint8", (side, side, 3), chunk_rows=chunk_rows)
    return RowLayout(rows=rows, block_rows=block_rows, arrays=(image, *_keys(chunk_rows)))


def bytes_to_stage(manifest: LatentManifest) -> int | None:
    """Bytes that a reader still has to copy to this machine; None for a local store, which is read in place.

    Args:
        manifest: the store's manifest, or an estimate of it without files.
    """
    if uri.local_path(manifest.uri) is not None:
        return None
    if manifest.files:
        return to_copy(manifest, stored_arrays(manifest)[1])
    if manifest.vae is None:
        return pixel_layout(manifest.count, manifest.resolution).data_bytes
    return latent_layout(manifest.count, manifest.flips, manifest.latent_shape).data_bytes


def _keys(chunk_rows: int) -> list[ArraySpec]:
    kinds = (("label", "int32"), ("source_index", "int64"))
    return [ArraySpec(name, dtype, (), chunk_rows=chunk_rows) for name, dtype in kinds]


class LatentReader:
    """Random access to the latents of a store.

    Args:
        manifest: the store's manifest.
        cache: as in `RowReader`.
        streamed: as in `RowReader`.

    Raises:
        InputError: the store holds pixels.
        StorageError: as `RowReader`.
    """

    def __init__(self, manifest: LatentManifest, cache: Path | None = None, *, streamed: bool = False) -> None:
        if manifest.vae is None:
            raise InputError(f"{manifest.url}: holds pixels, not latents")
        self.vae = manifest.vae
        self._rows = RowReader(manifest, cache, streamed=streamed)
        self.chunk_rows = self._rows.chunk_rows("mean")
        self.labels: NDArray[np.int32] = self._rows.array("label")

    def expect(self, indices: NDArray[np.int64], flips: NDArray[np.int64]) -> None:
        """Announce the images (B,) and their flips (B,) that will be read next, as `RowReader.expect`."""
        for name in ("mean", "std"):
            self._rows.expect(name, indices, flips)

    def moments(
        self, indices: NDArray[np.int64], flips: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Mean and standard deviation of the posterior, unscaled.

        Args:
            indices: (B,) images.
            flips: (B,) 0 for the image as it is, 1 for its mirror image; all 0 by default.

        Returns:
            Two arrays (B, C, h, w) float16.

        Raises:
            IndexError: the store has no such image or flip.
        """
        flips = np.zeros(len(indices), np.int64) if flips is None else flips
        return self._rows.take("mean", indices, flips), self._rows.take("std", indices, flips)


class PixelReader:
    """Random access to the images of a pixel store.

    Args:
        manifest: the store's manifest.
        cache: as in `RowReader`.
        streamed: as in `RowReader`.

    Raises:
        StorageError: as `RowReader`.
    """

    def __init__(self, manifest: LatentManifest, cache: Path | None = None, *, streamed: bool = False) -> None:
        self._rows = RowReader(manifest, cache, streamed=streamed)
        self.chunk_rows = self._rows.chunk_rows("image")
        self.labels: NDArray[np.int32] = self._rows.array("label")

    def expect(self, indices: NDArray[np.int64]) -> None:
        """Announce the images (B,) that will be read next, as `RowReader.expect`."""
        self._rows.expect("image", indices)

    def images(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images (B, H, H, 3) of ``indices`` (B,).

        Raises:
            IndexError: the store has no such image.
        """
        return self._rows.take("image", indices)
