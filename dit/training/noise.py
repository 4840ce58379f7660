"""The random numbers of a training step. They depend on (seed, step) and the place in the global batch alone."""

# B = rows of the global batch asked for, C = channels, H, W = height and width

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.random import Stream, normals, uniforms


@dataclass(frozen=True)
class StepDraws:
    """One step's draws for some rows of the global batch; normal numbers are float32, uniform ones float64."""

    t: Tensor
    """Uniform in [0, 1), (B,): the timestep, by the process's `sample_t`."""
    noise: Tensor
    """Standard normal, (B, C, H, W): the noise to predict."""
    label_drop: Tensor
    """Uniform in [0, 1), (B,): a label is dropped where this is below the dropout probability."""
    posterior: Tensor
    """Standard normal, (B, C, H, W): which latent the encoder's mean and deviation stand for."""
    flip: Tensor
    """Uniform in [0, 1), (B,): which way round the image is."""


def step_draws(
    seed: int,
    step: int,
    rows: Sequence[int],
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
) -> StepDraws:
    """The draws of a step.

    However a global batch is cut into ranks and micro-batches, each row gets the same numbers.

    Args:
        seed: seed of the run.
        step: number of the step.
        rows: places in the global batch, such as ``range(rank * local, (rank + 1) * local)``.
        shape: (C, H, W) of a latent.
        device: where the tensors go.
    """

    def uniform(stream: Stream) -> Tensor:
        return torch.from_numpy(uniforms(seed, stream, step, rows, 1)[:, 0]).to(device)

    def normal(stream: Stream) -> Tensor:
        count = shape[0] * shape[1] * shape[2]
        return torch.from_numpy(normals(seed, stream, step, rows, count)).to(device).reshape(-1, *shape)

    return StepDraws(
        t=uniform(Stream.TIMESTEP),
        noise=normal(Stream.NOISE),
        label_drop=uniform(Stream.LABEL_DROP),
        posterior=normal(Stream.POSTERIOR),
        flip=uniform(Stream.FLIP),
    )
