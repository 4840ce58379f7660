"""The training loop. It yields; its caller logs and saves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.diffusion.process import Process
from dit.ranks import Ranks
from dit.training.data import Batch
from dit.training.ema import EMA


@dataclass
class TrainState:
    """All that changes while training."""

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimizer steps taken."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured on this rank, as scalar tensors: reading them waits for the device."""

    step: int
    """Steps taken, this one included."""
    terms: dict[str, Tensor]
    """The loss and its parts, each a mean over this rank's batch."""
    gradient_norm: Tensor


@dataclass(frozen=True)
class Numbers:
    """How steps are taken."""

    learning_rate: Callable[[int], float]
    """Of the step with that number."""
    gradient_clip: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""
    autocast: torch.dtype | None = None
    """Lower precision of the forward pass; None computes in the parameters' own."""


def train(
    state: TrainState,
    process: Process,
    batches: Callable[[int], Batch],
    numbers: Numbers,
    *,
    stop: int,
    ranks: Ranks,
) -> Iterator[StepResult]:
    """Take optimizer steps until ``stop`` have been taken; ``state`` is up to date at each yield."""
    model = DistributedDataParallel(state.model) if ranks.world_size > 1 else state.model
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    while state.step < stop:
        batch = batches(state.step)
        device = batch.x0.device.type
        with _seeded(batch), torch.autocast(device, numbers.autocast, enabled=numbers.autocast is not None):
            told = model if batch.augment is None else partial(model, augment=batch.augment)
            terms = process.training_terms(told, batch.x0, batch.noise, process.sample_t(batch.u), batch.y)
        means = {name: term.mean() for name, term in terms.items()}
        means["loss"].backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if numbers.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, numbers.gradient_clip, norm)
        for group in state.optimizer.param_groups:
            group["lr"] = numbers.learning_rate(state.step)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(state.model, state.step)
        state.step += 1
        yield StepResult(state.step, {name: mean.detach() for name, mean in means.items()}, norm)


@contextmanager
def _seeded(batch: Batch) -> Iterator[None]:
    """Torch's own generators, which dropout draws from, at the batch's seed for the length of the block."""
    device = batch.x0.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(batch.seed)
        yield
