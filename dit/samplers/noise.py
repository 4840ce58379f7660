"""Noise and labels of samples. Those of sample i are the same in any batch, on any rank, in any order."""

# B = batch, C = channels, H, W = height and width

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.random import Stream, normals, uniforms


@dataclass(frozen=True)
class SampleNoise:
    """All random numbers of some samples, keyed by (seed, sample index, step)."""

    seed: int
    indices: Sequence[int]
    """Indices of the samples in the whole set, (B,)."""
    shape: tuple[int, int, int]
    """(C, H, W)."""
    device: torch.device | str = "cpu"

    def initial(self) -> Tensor:
        """Standard normal numbers (B, C, H, W) in float32 that sampling starts from."""
        return self._normals(Stream.SAMPLE_INITIAL, 0)

    def __call__(self, step: int) -> Tensor:
        """Standard normal numbers (B, C, H, W) in float32 for a step."""
        return self._normals(Stream.SAMPLE_STEP, step)

    def labels(self, num_classes: int) -> Tensor:
        """Labels (B,), each class as likely as the others."""
        u = uniforms(self.seed, Stream.SAMPLE_LABEL, 0, self.indices, 1)[:, 0]
        return torch.from_numpy((u * num_classes).astype("int64")).to(self.device)

    def _normals(self, stream: Stream, step: int) -> Tensor:
        count = self.shape[0] * self.shape[1] * self.shape[2]
        rows = normals(self.seed, stream, step, self.indices, count)
        return torch.from_numpy(rows).to(self.device).reshape(-1, *self.shape)
