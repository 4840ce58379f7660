"""Processes and samplers together: a network that learns a mixture draws the mixture."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit.diffusion.build import build_process
from dit.diffusion.config import DiffusionConfig, EDMConfig
from dit.samplers.ddim import ddim
from dit.samplers.ddpm import ddpm
from dit.samplers.heun import heun
from dit.samplers.noise import SampleNoise
from dit.samplers.state import last

CONFIGS = {"gaussian": DiffusionConfig(), "edm": EDMConfig(sigma_data=1)}
STEPS = 1200
NOISE = SampleNoise(0, range(2), (1, 1, 1000))


def mixture(count: int, generator: torch.Generator) -> Tensor:
    """Two thirds at -0.8 and a third at 1.2, each with deviation 0.3: (B, 1, 1, 1)."""
    right = torch.rand(count, generator=generator) < 1 / 3
    return (torch.where(right, 1.2, -0.8) + 0.3 * torch.randn(count, generator=generator)).reshape(-1, 1, 1, 1)


def small_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 1))


@cache
def trained(kind: str) -> Callable[..., Tensor]:
    """A small network that has learned to undo a process on the mixture."""
    process, generator = build_process(CONFIGS[kind]), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = nn.ModuleList(small_network() for _ in range({"gaussian": 2, "edm": 1}[kind]))
    optimizer = torch.optim.Adam(nets.parameters(), 3e-3)

    def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        time = torch.stack([t / 1000, (t / 1000).sqrt()] if kind == "gaussian" else [t, t.exp()], 1).float()
        features = torch.cat([x.reshape(-1, 1), time.repeat_interleave(x[0].numel(), 0)], 1)
        return torch.cat([net(features).reshape(x.shape) for net in nets], 1)  # the noise, then the variance

    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / STEPS)
        x0 = mixture(512, generator)
        noise = torch.randn(x0.shape, generator=generator)
        t = process.sample_t(torch.rand(512, generator=generator))
        process.training_terms(model, x0, noise, t, None)["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def walk(sampler: Callable[..., Any], kind: str) -> Tensor:
    process: Any = build_process(CONFIGS[kind])
    if sampler is heun:
        return last(heun(process, trained(kind), NOISE.initial(), None))
    steps = 250 if sampler is ddpm else 100
    return last(sampler(process.respaced(steps), trained(kind), NOISE.initial(), None, NOISE))


@pytest.mark.parametrize(("sampler", "kind"), [(ddpm, "gaussian"), (ddim, "gaussian"), (heun, "edm")])
def test_a_trained_network_draws_the_mixture(sampler: Callable[..., Any], kind: str) -> None:
    samples = walk(sampler, kind).flatten()
    truth = mixture(200_000, torch.Generator().manual_seed(1)).flatten()
    assert float((samples > 0.2).float().mean()) == pytest.approx(1 / 3, abs=0.04)
    for power in (1, 2, 3):
        assert float((samples**power).mean()) == pytest.approx(float((truth**power).mean()), abs=0.12)
