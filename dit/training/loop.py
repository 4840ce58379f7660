"""The training loop. It yields; its caller logs and saves."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.diffusion.process import Process
from dit.ranks import Ranks
from dit.training.data import Batch
from dit.training.ema import EMA
from dit.training.parallelize import exchanging, synchronised, whole


@dataclass
class TrainState:
    """All that changes while training."""

    model: nn.Module
    averages: Mapping[str, EMA]
    """Moving averages of its parameters by name, the one that is called ``ema`` among them."""
    optimizer: torch.optim.Optimizer
    """A fused one, which can leave a step out without asking the device."""
    step: int = 0
    """Steps taken, the skipped ones included."""
    skipped: int | Tensor = 0
    """Steps whose loss or gradient was not finite: they changed nothing."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured, as scalar tensors: reading them waits for the device."""

    step: int
    """Steps taken, this one included."""
    terms: dict[str, Tensor]
    """The loss and its parts, each a mean over the global batch."""
    quartiles: Tensor
    """The loss of samples whose time is in each quarter of the process's times, (4,); not a number where none is."""
    gradient_norm: Tensor
    skipped: Tensor
    """Steps skipped up to now."""
    streak: Tensor
    """Of them, those in a row up to this one; 0 if this step was taken."""


@dataclass(frozen=True)
class Numbers:
    """How steps are taken."""

    learning_rate: Callable[[int], float]
    """Of the step with that number."""
    gradient_clip: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""
    autocast: torch.dtype | None = None
    """Lower precision of the forward pass; None computes in the parameters' own."""
    micro_batch: int | None = None
    """Images that a rank takes through the model at once; None takes all."""


def train(
    state: TrainState,
    process: Process,
    batches: Callable[[int], Batch],
    numbers: Numbers,
    *,
    stop: int,
    ranks: Ranks,
) -> Iterator[StepResult]:
    """Take optimizer steps until ``stop`` have been taken; ``state`` is up to date at each yield.

    A step whose loss or gradient is not finite, on any rank, is skipped on all of them: weights,
    moments and average stay as they are. Nothing here waits for the device.
    """
    model = synchronised(state.model, ranks)
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    streak: int | Tensor = 0
    rehearsed = not isinstance(model, DistributedDataParallel)
    while state.step < stop:
        batch = batches(state.step)
        if not rehearsed:  # DDP arranges its buckets, and so its sums, anew after its first gradients
            _accumulated(model, process, batch, numbers, ranks)
            state.optimizer.zero_grad(set_to_none=True)
            rehearsed = True
        terms, quartiles = _accumulated(model, process, batch, numbers, ranks)
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if numbers.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, numbers.gradient_clip, norm)
        good = (terms["loss"] * norm).isfinite()
        _step(state, numbers.learning_rate(state.step), good)
        state.skipped, streak = state.skipped + ~good, (streak + 1) * ~good
        yield StepResult(state.step, terms, quartiles, norm, state.skipped, streak)


def _step(state: TrainState, learning_rate: float, good: Tensor) -> None:
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]  # as a GradScaler tells fused optimizers
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for average in state.averages.values():
        average.update(state.model, state.step, good)
    state.step += 1


def _accumulated(
    model: nn.Module, process: Process, batch: Batch, numbers: Numbers, ranks: Ranks
) -> tuple[dict[str, Tensor], Tensor]:
    """Add up a batch's gradients in the parameters.

    Returns:
        The means of the loss and its parts over all ranks, and the loss by quartile of the time.
    """
    parts = batch.split(numbers.micro_batch)
    sums: dict[str, Tensor] = {}
    losses = []
    for number, part in enumerate(parts, start=1):
        with exchanging(model, number == len(parts)):  # once a step
            terms = _terms(model, process, part, numbers)
            share = len(part.x0) / len(batch.x0)
            means = {name: term.mean() * share for name, term in terms.items()}
            means["loss"].backward()
        for name, mean in means.items():
            sums[name] = sums.get(name, 0) + mean.detach().double()
        losses.append(terms["loss"].detach().double())
    return _over_all(sums, _by_quartile(batch.u, torch.cat(losses)), ranks)


def _by_quartile(u: Tensor, losses: Tensor) -> Tensor:
    """Sums of losses (B,) and their numbers by quarter of u in [0, 1), (8,)."""
    quarter = nn.functional.one_hot((4 * u).long(), 4).double()
    return torch.cat([losses @ quarter, quarter.sum(0)])


def _over_all(sums: dict[str, Tensor], by_quartile: Tensor, ranks: Ranks) -> tuple[dict[str, Tensor], Tensor]:
    total = torch.cat([torch.stack(list(sums.values())), by_quartile])
    if ranks.world_size > 1:
        dist.all_reduce(total)
    means, losses, counts = total.split([len(sums), 4, 4])
    return dict(zip(sums, means / ranks.world_size, strict=True)), losses / counts


def _terms(model: nn.Module, process: Process, batch: Batch, numbers: Numbers) -> dict[str, Tensor]:
    with torch.autocast(batch.x0.device.type, numbers.autocast, enabled=numbers.autocast is not None):
        told = partial(model, **batch.told)
        return process.training_terms(told, batch.x0, batch.noise, process.sample_t(batch.u), batch.y)
