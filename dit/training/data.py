"""What a training step trains on, as a function of the step alone."""

# B = batch of this rank, C = channels, h = latent side, N = latents in the store

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit.training.noise import step_draws
from dit.training.ranks import Ranks
from storage.latents import LatentReader
from storage.order import permutation


@dataclass(frozen=True)
class Batch:
    """Everything random and everything read for one step on one rank."""

    x0: Tensor
    """Scaled latents (B, C, h, h): one sample of each posterior."""
    noise: Tensor
    """Standard normal (B, C, h, h)."""
    u: Tensor
    """Uniform in [0, 1), (B,), for the timesteps."""
    y: Tensor | None
    """Labels (B,), the dropped ones replaced by the null label."""


@dataclass(frozen=True)
class LatentBatches:
    """The batches of a run: position p of the stream of samples is item p mod N of epoch p div N."""

    reader: LatentReader
    batch_size: int
    """Of all ranks together."""
    seed: int
    flips: bool
    num_classes: int
    label_dropout: float
    ranks: Ranks
    device: torch.device

    def __call__(self, step: int) -> Batch:
        """The batch of a step for this rank. The same step gives the same bits, whenever it is asked for."""
        local = self.batch_size // self.ranks.world_size
        rows = range(self.ranks.rank * local, (self.ranks.rank + 1) * local)
        manifest = self.reader.manifest
        draws = step_draws(self.seed, step, rows, manifest.latent_shape, self.device)
        items = self._items(step * self.batch_size + np.asarray(rows))
        flips = (draws.flip.cpu().numpy() < 0.5).astype(np.int64) if self.flips else np.zeros(local, np.int64)
        mean, std = (torch.from_numpy(part).to(self.device).float() for part in self.reader.moments(items, flips))
        vae = manifest.vae
        x0 = (mean + std * draws.posterior - vae.shift_factor) * vae.scaling_factor
        return Batch(x0, draws.noise, draws.t, self._labels(items, draws.label_drop))

    def _items(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, places = np.divmod(positions, len(self.reader))
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = _order(self.seed, int(epoch), len(self.reader))[places[here]]
        return items

    def _labels(self, items: NDArray[np.int64], drop: Tensor) -> Tensor | None:
        if self.num_classes == 0:
            return None
        labels = torch.from_numpy(self.reader.labels[items]).to(self.device).long()
        return labels.masked_fill(drop < self.label_dropout, self.num_classes)


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return permutation(seed, epoch, n)
