"""The batches of a run: a batch is a function of the seed and the step alone."""

# B = batch of this rank, C = channels, h = side of a latent or an image, N = images in the store

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit.devices import sent
from dit.latent_scale import LatentScale
from dit.pixels import to_unit
from dit.ranks import Ranks
from dit.training.augment import augmented
from dit.training.draws import StepDraws
from storage.channels import ChannelScale
from storage.latents import LatentManifest
from storage.order import POOL, coins, permutation, pooled
from storage.rows.store import RowReader

Order = Literal["shuffled", "pooled"]


@dataclass(frozen=True)
class Batch:
    """All data and all random numbers of one step on one rank."""

    x0: Tensor
    """Data (B, C, h, h), scaled as the model expects it."""
    noise: Tensor
    """Standard normal (B, C, h, h)."""
    u: Tensor
    """Uniform in [0, 1), (B,), for the times."""
    y: Tensor | None
    """Labels (B,), dropped ones replaced by the null label; None if the model is unconditional."""
    augment: Tensor | None = None
    """Augmentation labels (B, 9); None if images are not augmented."""
    dropout: Tensor | None = None
    """Random keys of the model's dropout (B,), int64; None without dropout."""

    @property
    def model_kwargs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model beside data, time and labels."""
        kwargs = {"augment": self.augment, "dropout": self.dropout}
        return {name: value for name, value in kwargs.items() if value is not None}

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        parts: dict[str, Any] = {
            name: value if value is None else value.to(device) for name, value in vars(self).items()
        }
        return Batch(**parts)

    def split(self, size: int | None) -> list["Batch"]:
        """Micro-batches of at most ``size`` rows, in order; None does not split."""
        size = size or len(self.x0)
        parts: list[dict[str, Any]] = [
            {name: value if value is None else value[at : at + size] for name, value in vars(self).items()}
            for at in range(0, len(self.x0), size)
        ]
        return [Batch(**part) for part in parts]


class Data(Protocol):
    """Images of a store or in memory, scaled for training."""

    @property
    def labels(self) -> NDArray[np.int32]:
        """(N,)"""

    @property
    def chunk_rows(self) -> int:
        """Images in a chunk, which is fetched as a whole."""

    def x0(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_], draws: StepDraws) -> Tensor:
        """Data (B, C, h, h) of the images ``items`` (B,), some of them ``mirrored`` (B,)."""

    def expect(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> None:
        """Announce the images that will be asked for next, and which of them mirrored."""


class Rows(Protocol):
    """Arrays of images by name, of a store or in memory."""

    def array(self, name: str) -> NDArray[Any]:
        """A whole array (N, ...)."""

    def chunk_rows(self, name: str) -> int:
        """Images in a chunk of an array."""

    def take(self, name: str, indices: NDArray[np.int64], axis0: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """The rows (B, ...) with these indices (B,); of an array of flips (N, F, ...) one flip each, ``axis0`` (B,)."""

    def expect(self, name: str, indices: NDArray[np.int64], axis0: NDArray[np.int64] | None = None) -> None:
        """Announce the rows that will be taken next."""


class Latents:
    """Latents: one sample of each posterior, shifted and scaled.

    Args:
        rows: arrays ``mean`` and ``std`` float (N, F, C, h, h), and ``label`` int32 (N,).
        scale: the scale on which the model sees them.
    """

    def __init__(self, rows: Rows, scale: LatentScale) -> None:
        self.labels: NDArray[np.int32] = rows.array("label")
        self.chunk_rows = rows.chunk_rows("mean")
        self._rows, self._scale = rows, scale

    def x0(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_], draws: StepDraws) -> Tensor:
        """See `Data`."""
        flips = mirrored.astype(np.int64)
        mean, std = (sent(self._rows.take(name, items, flips), draws.device).float() for name in ("mean", "std"))
        return self._scale.scaled(mean + std * draws.posterior)

    def expect(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> None:
        """See `Data`."""
        for name in ("mean", "std"):
            self._rows.expect(name, items, mirrored.astype(np.int64))


class Pixels:
    """Pixels in -1 .. 1.

    Args:
        rows: arrays ``image`` uint8 (N, H, H, 3) and ``label`` int32 (N,).
    """

    def __init__(self, rows: Rows) -> None:
        self.labels: NDArray[np.int32] = rows.array("label")
        self.chunk_rows = rows.chunk_rows("image")
        self._rows = rows

    def x0(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_], draws: StepDraws) -> Tensor:
        """See `Data`."""
        x0 = to_unit(sent(self._rows.take("image", items), draws.device))
        flip = sent(mirrored, draws.device)[:, None, None, None]
        return torch.where(flip, x0.flip(3), x0)

    def expect(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> None:
        """See `Data`."""
        self._rows.expect("image", items)


def open_data(
    manifest: LatentManifest,
    channels: ChannelScale | None = None,
    *,
    streamed: bool = False,
    start: str | None = None,
) -> Data:
    """Open the images of a store. Every object is first compared with its hash, once on each machine.

    Args:
        manifest: manifest of the store.
        channels: statistics to normalise latents by; None for the autoencoder's scaling.
        streamed: fetch chunks as steps need them, instead of copying the store to this machine; needs the
            pooled order.
        start: an id of this start, the same on all ranks, to compare the whole store again.

    Raises:
        StorageError: an object is missing or damaged, or the disk is full; the line names it.
    """
    rows = RowReader(manifest, streamed=streamed, start=start)
    return Latents(rows, LatentScale.of(manifest.vae, channels)) if manifest.vae else Pixels(rows)


@dataclass(frozen=True)
class Batches:
    """The batches of a run. Position p of the stream of samples is item p mod N of epoch p div N."""

    data: Data
    shape: tuple[int, int, int]
    """(C, h, h)."""
    batch_size: int
    """Images in a step, over all ranks."""
    seed: int
    flips: bool
    num_classes: int
    label_dropout: float
    ranks: Ranks
    device: torch.device
    augmentation: float = 0.0
    """Probability of each distortion; 0 turns augmentation off."""
    order: Order = "shuffled"
    """Order of the items in an epoch. In the pooled order a chunk is mirrored as a whole."""
    streamed: bool = False
    """Announce to the data which items come next; needs the pooled order."""
    dropout: bool = False
    """Whether the model has dropout."""

    def __call__(self, step: int) -> Batch:
        """The batch of a step for this rank. The same step always gives the same bits."""
        local = self.batch_size // self.ranks.world_size
        rows = range(self.ranks.rank * local, (self.ranks.rank + 1) * local)
        draws = StepDraws(self.seed, step, rows, self.shape, self.device)
        positions = step * self.batch_size + np.asarray(rows)
        items = self._items(positions)
        if self.order == "pooled":
            mirrored = self._mirrored_chunks(positions, items)
        else:
            mirrored = draws.flip.cpu().numpy() < 0.5 if self.flips else np.zeros(local, np.bool_)
        if self.streamed:
            self._expect(step)
        x0, augment = self.data.x0(items, mirrored, draws), None
        if self.augmentation:
            x0, augment = augmented(x0, draws.augment, self.augmentation)
        dropout = draws.dropout if self.dropout else None
        return Batch(x0, draws.noise, draws.t, self._labels(items, draws.label_drop), augment, dropout)

    def items(self, step: int) -> NDArray[np.int64]:
        """Images of a step over all ranks, (batch_size,)."""
        return self._items(step * self.batch_size + np.arange(self.batch_size))

    def _items(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        count = len(self.data.labels)
        epochs, offsets = np.divmod(positions, count)
        items = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            order = _order(self.order, self.seed, int(epoch), count, self.data.chunk_rows)
            items[in_epoch] = order[offsets[in_epoch]]
        return items

    def _mirrored_chunks(self, positions: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which items at these positions are mirrored, where a chunk is mirrored as a whole."""
        mirrored = np.zeros(len(items), np.bool_)
        count, chunk = len(self.data.labels), self.data.chunk_rows
        for epoch in np.unique(positions // count) if self.flips else ():
            in_epoch = positions // count == epoch
            mirrored[in_epoch] = coins(self.seed, int(epoch), -(-count // chunk))[items[in_epoch] // chunk]
        return mirrored

    def _expect(self, step: int) -> None:
        """Announce the items from the start of this step's pool to the end of the next pool."""
        span = max(POOL * self.data.chunk_rows, self.batch_size)
        positions = np.arange(2 * span) + step * self.batch_size // span * span
        items = self._items(positions)
        self.data.expect(items, self._mirrored_chunks(positions, items))

    def _labels(self, items: NDArray[np.int64], drop: Tensor) -> Tensor | None:
        if self.num_classes == 0:
            return None
        labels = sent(self.data.labels[items], self.device).long()
        return labels.masked_fill(drop < self.label_dropout, self.num_classes)


@lru_cache(maxsize=3)  # a batch can span two epochs, and prefetching one more
def _order(order: Order, seed: int, epoch: int, n: int, chunk: int) -> NDArray[np.int64]:
    return permutation(seed, epoch, n) if order == "shuffled" else pooled(seed, epoch, n, chunk)
