"""What a training step trains on, as a function of the step alone."""

# B = batch of this rank, C = channels, h = side of a latent or an image, N = images in the store

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit.devices import sent
from dit.pixels import to_unit
from dit.ranks import Ranks
from dit.training.augment import augmented
from dit.training.draws import StepDraws
from storage.latents import LatentManifest, LatentReader, PixelReader
from storage.order import POOL, coins, permutation, pooled

Order = Literal["shuffled", "pooled"]


@dataclass(frozen=True)
class Batch:
    """Everything random and everything read for one step on one rank."""

    x0: Tensor
    """Data (B, C, h, h), scaled as the model sees it."""
    noise: Tensor
    """Standard normal (B, C, h, h)."""
    u: Tensor
    """Uniform in [0, 1), (B,), for the timesteps."""
    y: Tensor | None
    """Labels (B,), the dropped ones replaced by the null label."""
    augment: Tensor | None = None
    """How the images were distorted, (B, 9); None if they never are."""
    dropout: Tensor | None = None
    """Random words (B,), int64, that decide what the model drops; None if it drops nothing."""

    @property
    def told(self) -> dict[str, Tensor]:
        """What the model is given besides data, time and labels, by name."""
        told = {"augment": self.augment, "dropout": self.dropout}
        return {name: value for name, value in told.items() if value is not None}

    def split(self, size: int | None) -> list["Batch"]:
        """Micro-batches of at most so many rows, in order; None is one of all."""
        size = size or len(self.x0)
        parts: list[dict[str, Any]] = [
            {name: value if value is None else value[at : at + size] for name, value in vars(self).items()}
            for at in range(0, len(self.x0), size)
        ]
        return [Batch(**part) for part in parts]


class Data(Protocol):
    """Images of a store, as a model is trained on them."""

    @property
    def labels(self) -> NDArray[np.int32]:
        """(N,)"""

    @property
    def chunk_rows(self) -> int:
        """Images that are fetched together."""

    def x0(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_], draws: StepDraws) -> Tensor:
        """Data (B, C, h, h) of the images ``items`` (B,), some of them ``mirrored`` (B,)."""

    def expect(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> None:
        """Say which images will be asked for from now on, and which of them mirrored."""


@dataclass(frozen=True)
class Latents:
    """One sample of each posterior, shifted and scaled."""

    reader: LatentReader

    @property
    def labels(self) -> NDArray[np.int32]:
        """(N,)"""
        return self.reader.labels

    @property
    def chunk_rows(self) -> int:
        """See `Data`."""
        return self.reader.chunk_rows

    def x0(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_], draws: StepDraws) -> Tensor:
        """See `Data`."""
        moments = self.reader.moments(items, mirrored.astype(np.int64))
        mean, std = (sent(part, draws.device).float() for part in moments)
        vae = self.reader.vae
        return (mean + std * draws.posterior - vae.shift_factor) * vae.scaling_factor

    def expect(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> None:
        """See `Data`."""
        self.reader.expect(items, mirrored.astype(np.int64))


@dataclass(frozen=True)
class Pixels:
    """The images themselves, in -1 .. 1."""

    reader: PixelReader

    @property
    def labels(self) -> NDArray[np.int32]:
        """(N,)"""
        return self.reader.labels

    @property
    def chunk_rows(self) -> int:
        """See `Data`."""
        return self.reader.chunk_rows

    def x0(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_], draws: StepDraws) -> Tensor:
        """See `Data`."""
        x0 = to_unit(sent(self.reader.images(items), draws.device))
        chosen = sent(mirrored, draws.device)
        return torch.where(chosen[:, None, None, None], x0.flip(3), x0)

    def expect(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> None:
        """See `Data`."""
        self.reader.expect(items)


def open_data(manifest: LatentManifest, *, streamed: bool = False) -> Data:
    """The images of a store, every object of which is compared with its hash first, once on each machine.

    Args:
        manifest: of the store.
        streamed: fetch what a step needs instead of copying the store to this machine; for the pooled order.

    Raises:
        StorageError: an object is missing or damaged, or the disk has no room; the line names it.
    """
    if manifest.vae:
        return Latents(LatentReader(manifest, streamed=streamed))
    return Pixels(PixelReader(manifest, streamed=streamed))


@dataclass(frozen=True)
class Batches:
    """The batches of a run: position p of the stream of samples is item p mod N of epoch p div N."""

    data: Data
    shape: tuple[int, int, int]
    """(C, h, h)."""
    batch_size: int
    """Of all ranks together."""
    seed: int
    flips: bool
    num_classes: int
    label_dropout: float
    ranks: Ranks
    device: torch.device
    augmentation: float = 0.0
    """Probability of each distortion; 0 is none, and no labels of it."""
    order: Order = "shuffled"
    """Of the items in an epoch; in the pooled one the images of a chunk are all mirrored or none is."""
    streamed: bool = False
    """Tell the data which items come next; in the pooled order."""
    dropout: bool = False
    """Whether the model drops anything."""

    def __call__(self, step: int) -> Batch:
        """The batch of a step for this rank. The same step gives the same bits, whenever it is asked for."""
        local = self.batch_size // self.ranks.world_size
        rows = range(self.ranks.rank * local, (self.ranks.rank + 1) * local)
        draws = StepDraws(self.seed, step, rows, self.shape, self.device)
        positions = step * self.batch_size + np.asarray(rows)
        items = self._items(positions)
        if self.order == "pooled":
            mirrored = self._coins(positions, items)
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
        """The images of a step, (batch_size,), of all ranks together."""
        return self._items(step * self.batch_size + np.arange(self.batch_size))

    def _items(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        count = len(self.data.labels)
        epochs, places = np.divmod(positions, count)
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = _order(self.order, self.seed, int(epoch), count, self.data.chunk_rows)[places[here]]
        return items

    def _coins(self, positions: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which items at these positions are mirrored, when it is their chunk that decides."""
        mirrored = np.zeros(len(items), np.bool_)
        count, chunk = len(self.data.labels), self.data.chunk_rows
        for epoch in np.unique(positions // count) if self.flips else ():
            here = positions // count == epoch
            mirrored[here] = coins(self.seed, int(epoch), -(-count // chunk))[items[here] // chunk]
        return mirrored

    def _expect(self, step: int) -> None:
        """Announce what steps need from the pool of this one on until the end of the next."""
        span = max(POOL * self.data.chunk_rows, self.batch_size)
        positions = np.arange(2 * span) + step * self.batch_size // span * span
        items = self._items(positions)
        self.data.expect(items, self._coins(positions, items))

    def _labels(self, items: NDArray[np.int64], drop: Tensor) -> Tensor | None:
        if self.num_classes == 0:
            return None
        labels = sent(self.data.labels[items], self.device).long()
        return labels.masked_fill(drop < self.label_dropout, self.num_classes)


@lru_cache(maxsize=3)  # a batch may lie across two epochs, what is fetched ahead across one more
def _order(order: Order, seed: int, epoch: int, n: int, chunk: int) -> NDArray[np.int64]:
    return permutation(seed, epoch, n) if order == "shuffled" else pooled(seed, epoch, n, chunk)
