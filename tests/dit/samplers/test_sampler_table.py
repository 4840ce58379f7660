"""The table of samplers says what the samplers do."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from dit.diffusion.config import DiffusionConfig, EDMConfig, FlowConfig, ProcessConfig
from dit.samplers.config import SampleConfig
from dit.samplers.flow import COEFFICIENTS, Coefficient
from dit.samplers.noise import SampleNoise
from dit.samplers.table import FITTING, QUICK, SAMPLERS, sampler, unused_fields
from storage.errors import InputError

PROCESSES: dict[str, ProcessConfig] = {"gaussian": DiffusionConfig(), "edm": EDMConfig(), "flow": FlowConfig()}


class Counting:
    """A network of noise and variance that counts its passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.passes += 1
        return torch.cat([x / 2, x], 1)


def test_every_sampler_and_every_process_has_its_row() -> None:
    assert set(COEFFICIENTS) == set(get_args(Coefficient))
    assert {name for _, name in SAMPLERS} == set(get_args(SampleConfig.model_fields["sampler"].annotation))
    assert {kind for kind, _ in SAMPLERS} == set(PROCESSES) == set(FITTING) == set(QUICK)
    for kind, process in PROCESSES.items():
        row = sampler(SampleConfig(**FITTING[kind]), process)
        row.check(SampleConfig(**FITTING[kind]), process)
        assert (kind, QUICK[kind]) in SAMPLERS


@pytest.mark.parametrize(("kind", "name"), [key for key, row in SAMPLERS.items() if not row.adaptive])
@pytest.mark.parametrize("steps", [2, 5])
def test_passes_are_those_that_the_steps_take(kind: str, name: str, steps: int) -> None:
    config, noise, model = SampleConfig(sampler=name, steps=steps), SampleNoise(0, range(2), (1, 2, 2)), Counting()
    row = SAMPLERS[kind, name]
    states = list(row.states(config, PROCESSES[kind], lambda x, t, y: model(x, t, y)[:, : _out(kind)], None, noise))
    assert model.passes == row.passes(steps)
    assert [state.step for state in states] == list(reversed(range(steps)))
    assert {state.passes for state in states} == {None}


@pytest.mark.parametrize(("kind", "name"), [key for key, row in SAMPLERS.items() if row.adaptive])
def test_an_adaptive_sampler_counts_the_passes_of_each_sample(kind: str, name: str) -> None:
    noise, model = SampleNoise(0, range(3), (1, 2, 2)), Counting()
    config = SampleConfig(sampler=name)
    network = lambda x, t, y: model(x, t, y)[:, : _out(kind)]  # noqa: E731
    passes = list(SAMPLERS[kind, name].states(config, PROCESSES[kind], network, None, noise))[-1].passes
    assert passes is not None
    assert passes.shape == (3,)
    assert int(passes.max()) == model.passes


def _out(kind: str) -> int:
    return 2 if kind == "gaussian" else 1


def test_fields_of_other_samplers_are_unused() -> None:
    levels = {"sigma_min", "sigma_max", "rho"}
    tolerances, stochastic = {"rtol", "atol"}, {"diffusion_coefficient", "last_step"}
    of_flows = {"shift", *tolerances, *stochastic}
    assert unused_fields(SampleConfig(sampler="ddpm"), DiffusionConfig()) == {"eta", *levels, *of_flows}
    assert unused_fields(SampleConfig(sampler="ddim"), DiffusionConfig()) == levels | of_flows
    assert unused_fields(SampleConfig(sampler="heun"), EDMConfig()) == {"eta", *of_flows}
    assert unused_fields(SampleConfig(sampler="heun"), FlowConfig()) == {"eta", *levels, *tolerances, *stochastic}
    assert unused_fields(SampleConfig(sampler="euler_maruyama"), FlowConfig()) == {"eta", *levels, *tolerances}
    assert unused_fields(SampleConfig(sampler="dopri5"), FlowConfig()) == {
        *("steps", "eta", "shift"),
        *levels,
        *stochastic,
    }
    for row in SAMPLERS.values():
        assert set(row.fields) <= set(SampleConfig.model_fields)


def test_what_fits_is_named() -> None:
    with pytest.raises(InputError, match=r"heun does not fit the model's process; use ddpm, ddim or dpm\+\+$"):
        sampler(SampleConfig(sampler="heun"), DiffusionConfig())
    with pytest.raises(InputError, match="ddpm does not fit the model's process; use heun$"):
        sampler(SampleConfig(), EDMConfig())
