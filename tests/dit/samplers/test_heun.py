"""Heun's method against solutions in closed form."""

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

from dit.diffusion.config import EDMConfig
from dit.diffusion.edm import EDM
from dit.samplers.guidance import Guided
from dit.samplers.heun import heun, noise_levels
from dit.samplers.state import last
from storage.errors import InputError

PROCESS = EDM.from_config(EDMConfig())


class Exact:
    """A perfect network for data of N(mean, std^2), seen through the preconditioning."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std, self.calls = mean, std, 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.calls += 1
        s = torch.exp(4 * t).reshape(-1, 1, 1, 1)
        spread = (s**2 + PROCESS.sigma_data**2).sqrt()
        x = x * spread
        expected = (self.std**2 * x + s**2 * self.mean) / (self.std**2 + s**2)
        return (expected - PROCESS.sigma_data**2 / spread**2 * x) * spread / (s * PROCESS.sigma_data)


def start() -> Tensor:
    return torch.linspace(-3, 3, 32, dtype=torch.float64).reshape(32, 1, 1, 1)


def error(steps: int) -> float:
    """The path of Gaussian data: (x - mean) / sqrt(std^2 + sigma^2) stays the same."""
    mean, std = 0.3, 0.7
    exact = mean + (80 * start() - mean) * std / (std**2 + 80**2) ** 0.5
    found = last(heun(PROCESS, Exact(mean, std), start(), None, steps=steps))
    return float((found - exact).abs().max())


def test_gaussian_data_ends_where_its_path_ends() -> None:
    assert error(18) < 0.11  # of a path that ends between -1.8 and 2.4
    assert error(320) < 3e-4


def test_the_error_falls_with_the_square_of_the_steps() -> None:
    assert error(40) / error(80) == pytest.approx(4, rel=0.25)
    assert error(80) / error(160) == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize(("steps", "evaluations"), [(18, 35), (40, 79)])
def test_evaluations(steps: int, evaluations: int) -> None:
    model = Exact(0, 1)
    states = list(heun(PROCESS, model, start(), None, steps=steps))
    assert model.calls == evaluations
    assert [state.step for state in states] == list(range(steps - 1, -1, -1))
    torch.testing.assert_close(states[-1].x, states[-1].x0)


def test_noise_levels() -> None:
    levels = noise_levels(18)
    assert levels.shape == (19,)
    assert (levels[1:] < levels[:-1]).all()
    assert [float(levels[i]) for i in (0, 17, 18)] == pytest.approx([80, 0.002, 0], rel=1e-12)
    assert float(levels[9]) == pytest.approx((80 ** (1 / 7) + 9 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)


@pytest.mark.filterwarnings("ignore:__array__")
def test_steps_are_diffusers() -> None:
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(8)
    scheduler.sigmas = torch.cat([noise_levels(8)[:1], noise_levels(8)[1:8].repeat_interleave(2), torch.zeros(1)])
    model, x = Exact(0.3, 0.7), start()
    ours = last(heun(PROCESS, model, x, None, steps=8))
    x = 80 * x
    for index, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index].expand(len(x))
        noise = (x - PROCESS.denoise(model, x, sigma, None)) / sigma.reshape(-1, 1, 1, 1)
        x = scheduler.step(noise, t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"steps": 1}, "at least 2"),
        ({"sigma_min": 0.0}, "above 0"),
        ({"sigma_max": 0.001}, "sigma_max above sigma_min"),
        ({"rho": 0.0}, "and rho 0 must be above 0"),
    ],
)
def test_levels_that_do_not_fall_are_refused(fields: dict[str, float], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        next(heun(PROCESS, Exact(0, 1), start(), None, **({"steps": 18} | fields)))


def test_precision_is_that_of_the_noise_and_no_gradient_is_kept() -> None:
    parameter = torch.ones((), requires_grad=True)
    for state in heun(PROCESS, lambda x, *_: parameter * x, start().float(), None, steps=3):
        assert state.x.dtype == torch.float32
        assert not state.x.requires_grad
        assert (2 * parameter).requires_grad


def test_guidance_of_the_network_is_guidance_of_the_data() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return torch.sin(x) + y.reshape(-1, 1, 1, 1)

    x, sigma, y = start()[:3], torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64), torch.tensor([1, 2, 3])
    found = PROCESS.denoise(Guided(model, 2.5, null_label=4, channels="all"), x, sigma, y)
    label, null = (PROCESS.denoise(model, x, sigma, labels) for labels in (y, y * 0 + 4))
    torch.testing.assert_close(found, null + 2.5 * (label - null))
