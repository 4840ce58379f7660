"""The training loop. It yields after each step, and its caller logs and saves."""

# B = rows of a micro-batch or of this rank's batch

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.diffusion.process import Process
from dit.ranks import Ranks
from dit.training.data import Batch
from dit.training.dispersive import Dispersive, outputs
from dit.training.ema import EMA
from dit.training.parallelize import data_parallel, full_tensor, gradient_sync


@dataclass
class TrainState:
    """Everything that changes during training."""

    model: nn.Module
    averages: Mapping[str, EMA]
    """Moving averages of the weights by name; one is called ``ema``."""
    optimizer: torch.optim.Optimizer
    """A fused one: it can skip a step without waiting for the device."""
    step: int = 0
    """Steps taken, skipped ones included."""
    skipped: int | Tensor = 0
    """Steps that changed nothing, because their loss or gradient was not finite."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured, as scalar tensors. Reading them waits for the device."""

    step: int
    """Steps taken, this one included."""
    terms: dict[str, Tensor]
    """The loss and its parts, each a mean over the global batch."""
    quartiles: Tensor
    """Mean loss of the samples in each quarter of the process's times, (4,); NaN where there are none."""
    gradient_norm: Tensor
    skipped: Tensor
    """Steps skipped so far."""
    skipped_in_a_row: Tensor
    """Steps skipped in a row up to this one; 0 if this step was taken."""
    batch: Batch
    """This rank's part of the batch."""

    @property
    def loss(self) -> float:
        """The mean loss over the global batch."""
        return float(self.terms["loss"])


@dataclass(frozen=True)
class StepConfig:
    """How an optimizer step is taken."""

    learning_rate: Callable[[int], float]
    """Learning rate of the step with that number."""
    gradient_clip: float | None = None
    """Largest norm of the gradient; None does not clip."""
    autocast: torch.dtype | None = None
    """Lower precision of the forward pass; None computes in the precision of the parameters."""
    micro_batch: int | None = None
    """Images that a rank passes through the model at once; None passes its whole batch."""
    dispersive: Dispersive | None = None
    """A term of the loss on a block's outputs for the whole batch; None for none."""


def train(
    state: TrainState,
    process: Process,
    batches: Callable[[int], Batch],
    config: StepConfig,
    *,
    stop: int,
    ranks: Ranks,
) -> Iterator[StepResult]:
    """Take optimizer steps until ``stop`` have been taken; ``state`` is up to date at each yield.

    A step whose loss or gradient is not finite on any rank is skipped on all ranks: weights, moments
    and averages stay as they are. Nothing here waits for the device.
    """
    model = data_parallel(state.model, ranks)
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    skipped_in_a_row: int | Tensor = 0
    rehearsed = not isinstance(model, DistributedDataParallel)
    while state.step < stop:
        batch = batches(state.step)
        if not rehearsed:
            # After its first gradients DDP rearranges its buckets, and with them the order of its sums.
            # One discarded pass makes all steps alike, also the first one after a resume.
            _accumulate(model, process, batch, config, ranks)
            state.optimizer.zero_grad(set_to_none=True)
            rehearsed = True
        terms, quartiles = _accumulate(model, process, batch, config, ranks)
        norm = full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if config.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, config.gradient_clip, norm)
        finite = (terms["loss"] * norm).isfinite()
        _step(state, config.learning_rate(state.step), finite)
        state.skipped, skipped_in_a_row = state.skipped + ~finite, (skipped_in_a_row + 1) * ~finite
        yield StepResult(state.step, terms, quartiles, norm, state.skipped, skipped_in_a_row, batch)


def eager_loss(model: nn.Module, process: Process, batch: Batch, config: StepConfig, ranks: Ranks) -> float:
    """The mean loss over the global batch, computed without compiled code."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        losses = [loss_terms(model, process, part, config)["loss"].double() for part in batch.split(config.micro_batch)]
    mean = torch.cat(losses).mean() / ranks.world_size
    if ranks.world_size > 1:
        dist.all_reduce(mean)
    return mean.item()


def _step(state: TrainState, learning_rate: float, finite: Tensor) -> None:
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    # Fused optimizers skip a step where found_inf is 1. GradScaler tells them so, too.
    state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for average in state.averages.values():
        average.update(state.model, state.step, finite)
    state.step += 1


def _accumulate(
    model: nn.Module, process: Process, batch: Batch, config: StepConfig, ranks: Ranks
) -> tuple[dict[str, Tensor], Tensor]:
    """Add up a batch's gradients in the parameters.

    Returns:
        The loss and its parts, means over all ranks; and the mean loss by quartile of the time, (4,).
    """
    parts = batch.split(config.micro_batch)
    sums: dict[str, Tensor] = {}
    losses, apart, pulls = [], config.dispersive, None
    if apart and len(parts) > 1:
        pulls = apart.pulls(_outputs(model, process, parts, config), ranks)
    for number, part in enumerate(parts, start=1):
        with gradient_sync(model, number == len(parts)), outputs(model, apart) as found:  # the sync: once a step
            terms = loss_terms(model, process, part, config)
            share = len(part.x0) / len(batch.x0)
            means = {name: term.mean() * share for name, term in terms.items()}
            objective = means["loss"]
            if apart:
                pulls = pulls or apart.pulls(found, ranks)
                objective = objective + (pulls.of_parts[number - 1] * found[0]).sum()
            objective.backward()
        for name, mean in means.items():
            sums[name] = sums.get(name, 0) + mean.detach().double()
        losses.append(terms["loss"].detach().double())
    if pulls:
        sums["dispersive"] = pulls.term
    return _mean_over_ranks(sums, _by_quartile(batch.u, torch.cat(losses)), ranks)


def _outputs(model: nn.Module, process: Process, parts: Sequence[Batch], config: StepConfig) -> list[Tensor]:
    """What the block of the dispersive loss returns for each part: a pass that leaves no gradients."""
    every = []
    for part in parts:  # with gradients, so compiled blocks compute the bits of the pass that follows
        with gradient_sync(model, enabled=False), outputs(model, config.dispersive) as found:
            loss_terms(model, process, part, config)
        every.append(found[0].detach())
    return every


def _by_quartile(u: Tensor, losses: Tensor) -> Tensor:
    """Sums of losses (B,), then counts of samples, by quarter of u in [0, 1): (8,)."""
    quarter = nn.functional.one_hot((4 * u).long(), 4).double()
    return torch.cat([losses @ quarter, quarter.sum(0)])


def _mean_over_ranks(sums: dict[str, Tensor], by_quartile: Tensor, ranks: Ranks) -> tuple[dict[str, Tensor], Tensor]:
    total = torch.cat([torch.stack(list(sums.values())), by_quartile])  # one message
    if ranks.world_size > 1:
        dist.all_reduce(total)
    means, losses, counts = total.split([len(sums), 4, 4])
    return dict(zip(sums, means / ranks.world_size, strict=True)), losses / counts


def loss_terms(model: nn.Module, process: Process, batch: Batch, config: StepConfig) -> dict[str, Tensor]:
    """The loss of each image of a batch, (B,), and its parts, by name."""
    with torch.autocast(batch.x0.device.type, config.autocast, enabled=config.autocast is not None):
        denoiser = partial(model, **batch.model_kwargs)
        return process.training_terms(denoiser, batch.x0, batch.noise, process.sample_t(batch.u), batch.y)
