"""The random numbers of a training step: functions of (seed, step, row of the global batch) alone."""

# B = rows of the global batch asked for, C = channels, H, W = height and width

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dit.devices import sent
from dit.random import Stream, normals, uniforms, words
from dit.training.augment import DRAWS


@dataclass(frozen=True)
class StepDraws:
    """One step's random numbers for some rows of the global batch. Normal ones are float32, uniform ones float64.

    A row gets the same numbers however the global batch is split into ranks and micro-batches. Each kind is
    drawn when it is first asked for.
    """

    seed: int
    step: int
    rows: Sequence[int]
    """Rows of the global batch, (B,), such as ``range(rank * local, (rank + 1) * local)``."""
    shape: tuple[int, int, int]
    """(C, H, W) of the data."""
    device: torch.device | str = "cpu"
    """Device of the tensors."""

    @cached_property
    def t(self) -> Tensor:
        """Uniform in [0, 1), (B,): made into a time by the process's `sample_t`."""
        return self._uniform(Stream.TIMESTEP)

    @cached_property
    def noise(self) -> Tensor:
        """Standard normal, (B, C, H, W): the noise to predict."""
        return self._normal(Stream.NOISE)

    @cached_property
    def label_drop(self) -> Tensor:
        """Uniform in [0, 1), (B,): a label is dropped where this is below the dropout probability."""
        return self._uniform(Stream.LABEL_DROP)

    @cached_property
    def posterior(self) -> Tensor:
        """Standard normal, (B, C, H, W): the sample of the autoencoder's posterior."""
        return self._normal(Stream.POSTERIOR)

    @cached_property
    def flip(self) -> Tensor:
        """Uniform in [0, 1), (B,): the image is mirrored where this is below 0.5."""
        return self._uniform(Stream.FLIP)

    @cached_property
    def augment(self) -> Tensor:
        """Uniform in [0, 1), (B, DRAWS): how `augmented` distorts the image."""
        return self._uniforms(Stream.AUGMENT, DRAWS)

    @cached_property
    def dropout(self) -> Tensor:
        """Random keys (B,), int64: what `keyed_dropout` drops."""
        drawn = words(self.seed, Stream.DROPOUT, self.step, self.rows, 1)[:, 0]
        return sent(drawn.view(np.int64), self.device)

    def _uniform(self, stream: Stream) -> Tensor:
        return self._uniforms(stream, 1)[:, 0]

    def _uniforms(self, stream: Stream, count: int) -> Tensor:
        return sent(uniforms(self.seed, stream, self.step, self.rows, count), self.device)

    def _normal(self, stream: Stream) -> Tensor:
        count = self.shape[0] * self.shape[1] * self.shape[2]
        rows = normals(self.seed, stream, self.step, self.rows, count)
        return sent(rows, self.device).reshape(-1, *self.shape)
