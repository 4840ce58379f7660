"""What a training step trains on, as a function of the step alone."""

# B = batch of this rank, C = channels, h = side of a latent or an image, N = images in the store

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit.pixels import to_unit
from dit.training.augment import augmented
from dit.training.noise import StepDraws
from dit.training.ranks import Ranks
from storage.latents import LatentManifest, LatentReader, PixelReader
from storage.order import permutation


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

    def x0(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_], draws: StepDraws) -> Tensor:
        """Data (B, C, h, h) of the images ``items`` (B,), some of them ``mirrored`` (B,)."""


@dataclass(frozen=True)
class Latents:
    """One sample of each posterior, shifted and scaled."""

    reader: LatentReader

    @property
    def labels(self) -> NDArray[np.int32]:
        """(N,)"""
        return self.reader.labels

    def x0(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_], draws: StepDraws) -> Tensor:
        """See `Data`."""
        moments = self.reader.moments(items, mirrored.astype(np.int64))
        mean, std = (torch.from_numpy(part).to(draws.device).float() for part in moments)
        vae = self.reader.vae
        return (mean + std * draws.posterior - vae.shift_factor) * vae.scaling_factor


@dataclass(frozen=True)
class Pixels:
    """The images themselves, in -1 .. 1."""

    reader: PixelReader

    @property
    def labels(self) -> NDArray[np.int32]:
        """(N,)"""
        return self.reader.labels

    def x0(self, items: NDArray[np.int64], mirrored: NDArray[np.bool_], draws: StepDraws) -> Tensor:
        """See `Data`."""
        x0 = to_unit(torch.from_numpy(self.reader.images(items)).to(draws.device))
        chosen = torch.from_numpy(mirrored).to(draws.device)
        return torch.where(chosen[:, None, None, None], x0.flip(3), x0)


def open_data(manifest: LatentManifest) -> Data:
    """The images of a store.

    Raises:
        StorageError: an object is missing or damaged; the line names it.
    """
    return Latents(LatentReader(manifest)) if manifest.vae else Pixels(PixelReader(manifest))


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
    dropout: bool = False
    """Whether the model drops anything."""

    def __call__(self, step: int) -> Batch:
        """The batch of a step for this rank. The same step gives the same bits, whenever it is asked for."""
        local = self.batch_size // self.ranks.world_size
        rows = range(self.ranks.rank * local, (self.ranks.rank + 1) * local)
        draws = StepDraws(self.seed, step, rows, self.shape, self.device)
        items = self.items(step)[rows.start : rows.stop]
        mirrored = draws.flip.cpu().numpy() < 0.5 if self.flips else np.zeros(local, np.bool_)
        x0, augment = self.data.x0(items, mirrored, draws), None
        if self.augmentation:
            x0, augment = augmented(x0, draws.augment, self.augmentation)
        dropout = draws.dropout if self.dropout else None
        return Batch(x0, draws.noise, draws.t, self._labels(items, draws.label_drop), augment, dropout)

    def items(self, step: int) -> NDArray[np.int64]:
        """The images of a step, (batch_size,), of all ranks together."""
        count = len(self.data.labels)
        epochs, places = np.divmod(step * self.batch_size + np.arange(self.batch_size), count)
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = _order(self.seed, int(epoch), count)[places[here]]
        return items

    def _labels(self, items: NDArray[np.int64], drop: Tensor) -> Tensor | None:
        if self.num_classes == 0:
            return None
        labels = torch.from_numpy(self.data.labels[items]).to(self.device).long()
        return labels.masked_fill(drop < self.label_dropout, self.num_classes)


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return permutation(seed, epoch, n)
