"""The table of samplers: one row for each process and sampler."""

# B = batch

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit.diffusion.config import DiffusionConfig, EDMConfig, FlowConfig, ProcessConfig
from dit.diffusion.edm import EDM
from dit.diffusion.flow import Flow
from dit.diffusion.gaussian import GaussianDiffusion
from dit.diffusion.process import Denoiser
from dit.diffusion.respace import kept_timesteps
from dit.samplers.config import SampleConfig
from dit.samplers.ddim import ddim
from dit.samplers.ddpm import ddpm
from dit.samplers.dopri5 import TYPICAL, dopri5
from dit.samplers.dpm import dpm, solver_timesteps
from dit.samplers.flow import euler, euler_maruyama, flow_heun, times
from dit.samplers.heun import heun, noise_levels
from dit.samplers.noise import SampleNoise
from dit.samplers.state import State, StepNoise
from storage.errors import InputError
from storage.parallel import ahead


@dataclass(frozen=True)
class Sampler:
    """What the sampling stage knows of a sampler of one process."""

    states: Callable[[SampleConfig, Any, Denoiser, Tensor | None, SampleNoise], Iterator[State]]
    """The states from noise to data: from the config, the process's config, the guided network, labels (B,) and the
    noise."""
    check: Callable[[SampleConfig, Any], object]
    """Raises `InputError` unless the config's steps and levels fit the process's config."""
    passes: Callable[[int], int]
    """Passes of the network for a number of steps, without guidance."""
    fields: tuple[str, ...] = ("steps",)
    """The fields of `SampleConfig` that it uses and not every sampler does."""
    adaptive: bool = False
    """Whether the number of passes differs between samples. Then `passes` is a guess."""


def sampler(config: SampleConfig, process: ProcessConfig) -> Sampler:
    """The row of a config's sampler.

    Raises:
        InputError: the sampler does not fit the process.
    """
    names = [name for kind, name in SAMPLERS if kind == process.kind]
    if config.sampler not in names:
        fitting = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        raise InputError(f"sample.sampler: {config.sampler} does not fit the model's process; use {fitting}")
    return SAMPLERS[process.kind, config.sampler]


def unused_fields(config: SampleConfig, process: ProcessConfig) -> frozenset[str]:
    """The fields of the config that only other samplers use."""
    return frozenset(field for row in SAMPLERS.values() for field in row.fields) - set(sampler(config, process).fields)


def _ddpm(
    config: SampleConfig, process: DiffusionConfig, model: Denoiser, y: Tensor | None, noise: SampleNoise
) -> Iterator[State]:
    return ddpm(_respaced(config, process, noise), model, noise.initial(), y, _step_noise(noise, config.steps))


def _ddim(
    config: SampleConfig, process: DiffusionConfig, model: Denoiser, y: Tensor | None, noise: SampleNoise
) -> Iterator[State]:
    respaced, step_noise = _respaced(config, process, noise), _step_noise(noise, config.steps)
    return ddim(respaced, model, noise.initial(), y, step_noise, eta=config.eta)


def _dpm(
    config: SampleConfig, process: DiffusionConfig, model: Denoiser, y: Tensor | None, noise: SampleNoise
) -> Iterator[State]:
    full = GaussianDiffusion.from_config(process).to(noise.device)
    return dpm(full, model, noise.initial(), y, steps=config.steps)


def _edm_heun(
    config: SampleConfig, process: EDMConfig, model: Denoiser, y: Tensor | None, noise: SampleNoise
) -> Iterator[State]:
    levels = {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max, "rho": config.rho}
    return heun(EDM.from_config(process), model, noise.initial(), y, steps=config.steps, **levels)


def _euler(
    config: SampleConfig, process: FlowConfig, model: Denoiser, y: Tensor | None, noise: SampleNoise
) -> Iterator[State]:
    return euler(Flow.from_config(process), model, noise.initial(), y, steps=config.steps, shift=config.shift)


def _flow_heun(
    config: SampleConfig, process: FlowConfig, model: Denoiser, y: Tensor | None, noise: SampleNoise
) -> Iterator[State]:
    return flow_heun(Flow.from_config(process), model, noise.initial(), y, steps=config.steps, shift=config.shift)


def _euler_maruyama(
    config: SampleConfig, process: FlowConfig, model: Denoiser, y: Tensor | None, noise: SampleNoise
) -> Iterator[State]:
    return euler_maruyama(
        Flow.from_config(process),
        model,
        noise.initial(),
        y,
        _step_noise(noise, config.steps),
        steps=config.steps,
        shift=config.shift,
        coefficient=config.diffusion_coefficient,
        last_step=config.last_step,
    )


def _dopri5(
    config: SampleConfig, process: FlowConfig, model: Denoiser, y: Tensor | None, noise: SampleNoise
) -> Iterator[State]:
    return dopri5(Flow.from_config(process), model, noise.initial(), y, rtol=config.rtol, atol=config.atol)


def _respaced(config: SampleConfig, process: DiffusionConfig, noise: SampleNoise) -> GaussianDiffusion:
    return GaussianDiffusion.from_config(process).respaced(config.steps).to(noise.device)


def _step_noise(noise: SampleNoise, steps: int) -> StepNoise:
    """The noise of all steps in the samplers' order, drawn in a thread while the network runs."""
    noises = ahead((noise(step) for step in reversed(range(1, steps))), 2)
    return lambda _: next(noises)


def _check_respaced(config: SampleConfig, process: DiffusionConfig) -> None:
    kept_timesteps(process.steps, config.steps)


def _check_dpm(config: SampleConfig, process: DiffusionConfig) -> None:
    solver_timesteps(process.steps, config.steps)


def _check_levels(config: SampleConfig, _: EDMConfig) -> None:
    noise_levels(config.steps, config.sigma_min, config.sigma_max, config.rho)


def _check_times(config: SampleConfig, process: FlowConfig) -> None:
    times(Flow.from_config(process), config.steps, shift=config.shift)


def _nothing(_: SampleConfig, __: FlowConfig) -> None:
    """Whatever the config allows fits."""


def _one_a_step(steps: int) -> int:
    return steps


def _two_a_step(steps: int) -> int:
    return 2 * steps - 1  # one in the last


SAMPLERS = {
    ("gaussian", "ddpm"): Sampler(_ddpm, _check_respaced, _one_a_step),
    ("gaussian", "ddim"): Sampler(_ddim, _check_respaced, _one_a_step, ("steps", "eta")),
    ("gaussian", "dpm++"): Sampler(_dpm, _check_dpm, _one_a_step),
    ("edm", "heun"): Sampler(_edm_heun, _check_levels, _two_a_step, ("steps", "sigma_min", "sigma_max", "rho")),
    ("flow", "euler"): Sampler(_euler, _check_times, _one_a_step, ("steps", "shift")),
    ("flow", "heun"): Sampler(_flow_heun, _check_times, _two_a_step, ("steps", "shift")),
    ("flow", "euler_maruyama"): Sampler(
        _euler_maruyama, _nothing, _one_a_step, ("steps", "shift", "diffusion_coefficient", "last_step")
    ),
    ("flow", "dopri5"): Sampler(_dopri5, _nothing, lambda _: TYPICAL, ("rtol", "atol"), adaptive=True),
}
"""Rows by kind of process and name."""
FITTING: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "edm": {"sampler": "heun", "steps": 18},
    "flow": {"sampler": "euler", "steps": 50},
}
"""Fields of `SampleConfig` that fit a process, by its kind, where none are asked for."""
QUICK = {"gaussian": "ddim", "edm": "heun", "flow": "euler"}
"""A deterministic sampler for a few steps, by kind of process."""
