"""Models that a check can afford: one for each kind of block, with data and weights that are the same everywhere."""

# B = batch, C = channels, h = side of a latent or an image

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit.devices import device
from dit.diffusion.build import build_process
from dit.diffusion.config import DiffusionConfig, EDMConfig, FlowConfig, ProcessConfig
from dit.models.build import build
from dit.models.config import DiffiTConfig, DiffiTImageConfig, DiTConfig, ModelConfig
from dit.ranks import Ranks
from dit.training.data import Batch
from dit.training.draws import StepDraws
from dit.training.loop import StepConfig, StepResult, TrainState, loss_terms, train

BATCH = 8
SEED = 1
WEIGHT_STD = 0.05
"""Of weights that training would start at zero, where nothing that comes before them could be seen."""
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """A small model and its process."""

    model: ModelConfig
    process: ProcessConfig


SHAPE: dict[str, Any] = {"input_size": 16, "width": 128, "depth": 2, "heads": 2, "num_classes": 10}
"""Heads of 64 channels and 64 tokens, which the fused kernels of GPUs take."""
LATER: dict[str, Any] = {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True, "learn_variance": False}
CASES = {
    "DiT": Case(DiTConfig.model_validate(SHAPE), DiffusionConfig()),
    "LightningDiT": Case(DiTConfig.model_validate(SHAPE | LATER), FlowConfig()),
    "DiffiT": Case(DiffiTConfig.model_validate(SHAPE), DiffusionConfig()),
    "DiffiT on images": Case(
        DiffiTImageConfig(input_size=16, stem_width=32, widths=(32, 64), depths=(1, 1), time_width=32, dropout=0.2),
        EDMConfig(),
    ),
}


def drawn(case: Case) -> nn.Module:
    """The model on this rank's device, with no weight at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build(case.model)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=WEIGHT_STD)
    return model.to(device())


def batch(config: ModelConfig, step: int = 0) -> Batch:
    """A batch of a step, on this rank's device: normal data, and labels in order."""
    shape = (config.in_channels, config.input_size, config.input_size)
    draws, data = (StepDraws(seed, step, range(BATCH), shape, device()) for seed in (SEED, SEED + 1))
    labels = torch.arange(BATCH, device=device()) if config.num_classes else None
    return Batch(data.noise, draws.noise, draws.t, labels, dropout=draws.dropout if config.uses_dropout else None)


def loss_and_gradients(case: Case, model: nn.Module, autocast: torch.dtype | None) -> Tensor:
    """The loss and all gradients of a batch, as one vector in float32."""
    process = build_process(case.process, device())
    loss = loss_terms(model, process, batch(case.model), StepConfig(lambda _: 0.0, autocast=autocast))["loss"].mean()
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return torch.cat([loss.detach().reshape(1), *gradients]).float()


def steps(case: Case, count: int, autocast: torch.dtype | None = None) -> Iterator[StepResult]:
    """Training steps as `dit.train` takes them."""
    model = drawn(case)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = TrainState(model, {}, torch.optim.AdamW(trained, LEARNING_RATE, fused=True))
    how = StepConfig(lambda _: LEARNING_RATE, autocast=autocast)
    process = build_process(case.process, device())
    return train(state, process, lambda step: batch(case.model, step), how, stop=count, ranks=Ranks())
