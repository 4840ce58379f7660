"""Stored training data: latents of an autoencoder, or pixels.

A latent is stored as mean and standard deviation of the autoencoder's posterior, both unscaled. At
each use, training draws mean + std * noise with new noise and then scales it.
"""

# N = images, F = flips (0: as it is, 1: mirrored), C = channels
# h, w = sides of a latent, H = side of an image, pixels

from typing import Annotated, ClassVar

from pydantic import AfterValidator

from storage import uri
from storage.channels import ChannelScale
from storage.config import Config, operational
from storage.manifest import Manifest
from storage.rows.format import stored_arrays
from storage.rows.staging import to_copy
from storage.rows.store import ArraySpec, RowLayout


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
    statistics: tuple[ChannelScale, ...] | None = None
    """Mean and deviation of each channel over all unscaled latents, each drawn from its posterior: of the images, and
    then of the mirrored ones if there are any. None: not known, as for pixels and for what earlier versions encoded.
    They follow from the latents, so they are no part of the content."""

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

    Examples:
        >>> layout = latent_layout(1_281_167, flips=2, shape=(4, 32, 32))
        >>> layout.blocks, layout.objects, f"{layout.size / 2**30:.1f} GiB"
        (313, 1878, '39.1 GiB')
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

    Examples:
        >>> [array.name for array in pixel_layout(50_000, side=32).arrays]
        ['image', 'label', 'source_index']
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
