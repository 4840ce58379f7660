"""Samplers of flows: against closed forms, plain loops, diffusers and torchdiffeq."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torchdiffeq import odeint

from dit.diffusion.config import FlowConfig
from dit.diffusion.flow import Flow
from dit.samplers.dopri5 import dopri5
from dit.samplers.flow import COEFFICIENTS, Coefficient, euler, euler_maruyama, flow_heun, times
from dit.samplers.noise import SampleNoise
from dit.samplers.state import end, last
from storage.errors import InputError

MEAN, DEVIATION = 2.0, 0.5
"""Of the Gaussian data, whose flow is known in closed form."""


def flow(path: str = "linear", predict: str = "velocity") -> Flow:
    return Flow.from_config(FlowConfig.model_validate({"path": path, "predict": predict}))


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


class Exact:
    """What a perfect network says of Gaussian data; remembers the times that it was asked for."""

    def __init__(self, process: Flow) -> None:
        self.process = process
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.times.append(float(t[0]))
        process = self.process
        alpha, sigma = column(process.alpha(t)), column(process.sigma(t))
        x0 = MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)
        noise = sigma / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)
        velocity = column(process.alpha_prime(t)) * x0 + column(process.sigma_prime(t)) * noise
        return {"velocity": velocity, "noise": noise, "data": x0}[process.config.predict]


def smooth(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """A network of more channels than the data has, that depends on noisy data and time."""
    wave = torch.sin(5 * t).reshape(-1, 1, 1, 1)
    return torch.cat([0.7 * torch.tanh(x) + 0.3 * wave, x - wave], 1)


def stochastic(coefficient: Coefficient) -> Any:
    """Euler-Maruyama with noise of its own."""

    def with_noise(process: Flow, model: Any, x: Tensor, y: Tensor | None, **fields: Any) -> Any:
        noise = SampleNoise(0, range(len(x)), (1, 1, 1))
        return euler_maruyama(process, model, x, y, noise, coefficient=coefficient, **fields)

    return with_noise


def start() -> Tensor:
    return torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(64, 1, 1, 1)


def errors(sampler: Any, process: Flow, steps: tuple[int, ...]) -> list[float]:
    """Distance from the end of the exact flow, which keeps the number of deviations from the mean."""
    alpha, sigma = process.alpha(torch.tensor(process.bounds[0])), process.sigma(torch.tensor(process.bounds[0]))
    noise = alpha * MEAN + (alpha**2 * DEVIATION**2 + sigma**2).sqrt() * start()
    found = (last(sampler(process, Exact(process), noise, None, steps=n)) for n in steps)
    return [float((x - MEAN - DEVIATION * start()).abs().max()) for x in found]


@pytest.mark.parametrize("predict", ["velocity", "noise", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_the_error_of_euler_falls_with_the_steps(path: str, predict: str) -> None:
    found = errors(euler, flow(path, predict), (40, 80, 160, 320))
    assert [math.log2(coarse / fine) for coarse, fine in pairwise(found)] == pytest.approx([1, 1, 1], abs=0.15)
    assert found[-1] < 0.02


@pytest.mark.parametrize("predict", ["velocity", "noise", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_the_error_of_heun_falls_with_the_square_of_the_steps(path: str, predict: str) -> None:
    found = errors(flow_heun, flow(path, predict), (40, 80, 160, 320))
    assert [math.log2(coarse / fine) for coarse, fine in pairwise(found)] == pytest.approx([2, 2, 2], abs=0.25)
    assert found[-1] < 1e-4


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_heun_is_a_plain_loop(path: str) -> None:
    process, x = flow(path), start()
    found = [state.x for state in flow_heun(process, smooth, x, None, steps=6, shift=0.5)]
    grid = [0.5 * n / 6 / (1 - 0.5 * n / 6) for n in range(7)]
    for place, (t, after) in enumerate(pairwise(grid)):
        slope = smooth(x, torch.full((64,), t, dtype=torch.float64), None)[:, :1]
        if place == 5:
            alpha, sigma, da, ds = (float(weight(torch.tensor(t, dtype=torch.float64))) for weight in weights(process))
            x = (ds * x - sigma * slope) / (alpha * ds - da * sigma)
        else:
            ahead = smooth(x + (after - t) * slope, torch.full((64,), after, dtype=torch.float64), None)[:, :1]
            x = x + (after - t) * (slope + ahead) / 2
        torch.testing.assert_close(found[place], x, rtol=1e-6, atol=1e-6)


def weights(process: Flow) -> list[Any]:
    return [process.alpha, process.sigma, process.alpha_prime, process.sigma_prime]


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_euler_steps_are_those_of_diffusers(shift: float) -> None:
    """Its time is 1 at the noise, its sigma, so its shift is the inverse of ours."""
    steps = 10
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / shift)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    expected, grid = x, times(flow(), steps, shift=shift)
    for state, t in zip(euler(flow(), smooth, x, None, steps=steps, shift=shift), scheduler.timesteps, strict=True):
        now = 1 - t / 1000
        assert float(now) == pytest.approx(float(grid[steps - 1 - state.step]), abs=1e-6)
        velocity = smooth(expected, now.repeat(2), None)[:, :4]
        expected = scheduler.step(-velocity, t, expected).prev_sample
        torch.testing.assert_close(state.x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "passes"),
    [(euler, 50), (flow_heun, 99), (dopri5, None), *((stochastic(name), 50) for name in COEFFICIENTS)],
)
@pytest.mark.parametrize("predict", ["velocity", "noise", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_networks_are_evaluated_within_the_bounds(path: str, predict: str, sampler: Any, passes: int | None) -> None:
    process = flow(path, predict)
    model = Exact(process)
    state = end(sampler(process, model, start().float(), None, **({"steps": 50} if passes else {"rtol": 1e-5})))
    first, final = process.bounds
    assert passes in (None, len(model.times))
    assert first - 1e-7 <= min(model.times) < max(model.times) <= final + 1e-7
    assert state.x.dtype == torch.float32
    assert state.x.isfinite().all()
    if sampler in (euler, flow_heun, dopri5):
        torch.testing.assert_close(state.x.double(), MEAN + DEVIATION * start(), rtol=0, atol=0.2)


def test_steps_that_begin_outside_the_bounds_are_refused() -> None:
    assert len(times(flow(), 5000)) == 5001
    with pytest.raises(InputError, match=r"sample.steps: the last of 1200 begins at t = 0.99917, .* up to 0.999; take"):
        times(flow(predict="data"), 1200)


def test_a_shift_below_1_shortens_the_steps_near_the_noise() -> None:
    grid = times(flow(), 4, shift=0.3)
    assert grid.tolist() == pytest.approx([0, 0.3 / 3.3, 0.3 / 1.3, 0.9 / 1.9, 1])
    assert times(flow(), 4).tolist() == [0, 0.25, 0.5, 0.75, 1]


def many() -> tuple[Tensor, SampleNoise]:
    noise = SampleNoise(0, range(10), (1, 1, 1000))
    return noise.initial().double(), noise


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_noise_on_the_way_leaves_mean_and_deviation(path: str, coefficient: Coefficient) -> None:
    process, (x, noise) = flow(path), many()
    fields: dict[str, Any] = {"steps": 250, "coefficient": coefficient, "last_step": 0.004}
    found = last(euler_maruyama(process, Exact(process), x, None, noise, **fields))
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.025)
    assert float(found.std()) == pytest.approx(DEVIATION, abs=0.02)
    correlation = float(torch.corrcoef(torch.stack([found.flatten(), x.flatten()]))[0, 1])
    assert abs(correlation) < 0.8  # without noise it is 1


def mixture(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """The velocity on the linear path to 0.3 N(-2, 0.3^2) + 0.7 N(1.5, 0.5^2)."""
    now, alpha = column(t), column(t)
    shares, means, deviations = (0.3, 0.7), (-2.0, 1.5), (0.3, 0.5)
    densities, velocities = [], []
    for share, mean, deviation in zip(shares, means, deviations, strict=True):
        variance = (alpha * deviation) ** 2 + (1 - now) ** 2
        densities.append(share * torch.exp(-((x - alpha * mean) ** 2) / (2 * variance)) / variance.sqrt())
        data = mean + alpha * deviation**2 / variance * (x - alpha * mean)
        velocities.append(data - (1 - now) / variance * (x - alpha * mean))
    total = densities[0] + densities[1]
    return (densities[0] * velocities[0] + densities[1] * velocities[1]) / total


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_noise_on_the_way_leaves_a_mixture(coefficient: Coefficient) -> None:
    x, noise = many()
    fields: dict[str, Any] = {"steps": 250, "coefficient": coefficient, "last_step": 0.004}
    found = last(euler_maruyama(flow(), mixture, x, None, noise, **fields)).flatten()
    left, right = found[found < -0.5], found[found >= -0.5]
    assert len(left) / len(found) == pytest.approx(0.3, abs=0.015)
    assert (float(left.mean()), float(left.std())) == pytest.approx((-2, 0.3), abs=0.03)
    assert (float(right.mean()), float(right.std())) == pytest.approx((1.5, 0.5), abs=0.03)


W = {
    "sigma": lambda alpha, sigma, da, ds, t: sigma,
    "linear": lambda alpha, sigma, da, ds, t: 1 - t,
    "constant": lambda alpha, sigma, da, ds, t: 1,
    "sbdm": lambda alpha, sigma, da, ds, t: da / alpha * sigma**2 - sigma * ds,
}


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_euler_maruyama_is_a_plain_loop(path: str, coefficient: Coefficient) -> None:
    """With the score as in SiT, equation 9."""
    process, x = flow(path), start()
    noise = SampleNoise(0, range(64), (1, 1, 1))
    states = euler_maruyama(process, smooth, x, None, noise, steps=6, coefficient=coefficient, last_step=0.1)
    found = [state.x for state in states]
    grid = [*torch.linspace(1e-3 if coefficient == "sbdm" else 0, 0.9, 6, dtype=torch.float64).tolist(), 1.0]
    for place, (t, after) in enumerate(pairwise(grid)):
        alpha, sigma, da, ds = (float(weight(torch.tensor(t, dtype=torch.float64))) for weight in weights(process))
        velocity = smooth(x, torch.full((64,), t, dtype=torch.float64), None)[:, :1]
        score = (alpha / da * velocity - x) / (sigma**2 - alpha / da * ds * sigma)
        w = W[coefficient](alpha, sigma, da, ds, t)
        x = x + (velocity + w * score) * (after - t)
        if place < 5:
            x = x + math.sqrt(2 * w * (after - t)) * noise(5 - place)
        torch.testing.assert_close(found[place], x, rtol=1e-5, atol=1e-5)


def lively(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """A network that needs shorter steps for some samples than for others."""
    return smooth(x, 3 * t * x[:, 0, 0, 0].abs(), y)


@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-6), (1e-6, 1e-6), (0.1, 1e-3)])
def test_dopri5_is_torchdiffeq_on_each_sample_alone(rtol: float, atol: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64) * column(torch.tensor([1, 2, 0.1, 1, 3]))
    state = end(dopri5(flow(), lively, x, None, rtol=rtol, atol=atol))
    assert state.passes is not None
    times, step_t = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    for each in range(5):
        passes = 0

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            nonlocal passes
            passes += 1
            return lively(x, t.reshape(1), None)[:, :4]

        alone = x[each : each + 1]
        theirs = odeint(velocity, alone, times, rtol=rtol, atol=atol, method="dopri5", options={"step_t": step_t})[-1]
        torch.testing.assert_close(state.x[each : each + 1], theirs, rtol=1e-6, atol=1e-6)
        assert int(state.passes[each]) == passes
    assert len(set(state.passes.tolist())) > 2


def test_dopri5_of_a_sample_does_not_depend_on_its_batch() -> None:
    x = SampleNoise(0, range(16), (4, 8, 8)).initial()
    whole = end(dopri5(flow(), lively, x, None))
    for batch in ([5], [3, 4, 5], [15, 0]):
        part = end(dopri5(flow(), lively, x[batch], None))
        assert torch.equal(part.x, whole.x[batch])
        assert part.passes is not None
        assert whole.passes is not None
        assert torch.equal(part.passes, whole.passes[batch])


@pytest.mark.parametrize("predict", ["velocity", "noise", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_dopri5_ends_where_the_exact_flow_does(path: str, predict: str) -> None:
    process = flow(path, predict)
    dopri = lambda *args, steps: dopri5(*args, rtol=1e-7, atol=1e-7)  # noqa: E731
    assert errors(dopri, process, (1,))[0] < (3e-3 if process.bounds[1] < 1 else 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_lost_ends_and_spoils_no_other(bad: float) -> None:
    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return torch.where((t > 0.5) & (x[:, 0, 0, 0] > 2.5), bad, 0.0).reshape(-1, 1, 1, 1) + torch.tanh(x)

    found = last(dopri5(flow(), network, start(), None)).flatten()
    assert not found.isfinite().all()
    kept = found.isfinite()
    assert torch.equal(found[kept], last(dopri5(flow(), network, start()[kept], None)).flatten())


def test_a_tolerance_below_the_rounding_errors_of_the_network_ends_with_what_to_change() -> None:
    """They do not become smaller with the steps, as the errors of a smooth velocity do."""

    def rounded(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return torch.tanh(3 * x + column(t)).bfloat16().double()

    x = SampleNoise(0, range(2), (4, 8, 8)).initial().double()
    said = r"sample\.rtol: dopri5 has taken 5,000 passes up to time 0\.\d+ of 1; raise sample\.rtol or atol, or set"
    with pytest.raises(InputError, match=rf"^{said} sample\.precision=float32$"):
        last(dopri5(flow(), rounded, x, None, rtol=0, atol=1e-9))


def test_a_network_of_zeros_takes_long_steps() -> None:
    state = end(dopri5(flow(), lambda x, t, y: 0 * x, start(), None))
    assert torch.equal(state.x, start())
    assert state.passes is not None
    assert int(state.passes.max()) < 100


@pytest.mark.parametrize("predict", ["velocity", "noise", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("share", [0.0099, 0.001])
def test_the_first_step_of_a_flat_flow_stays_within_the_bounds(path: str, predict: str, share: float) -> None:
    """Its slope alone would let the first step, tried to see how the slope changes, go beyond the last time."""
    process, asked = flow(path, predict), list[float]()

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        asked.append(float(t.max()))
        return share * x

    state = end(dopri5(process, network, start(), None))
    assert state.x.isfinite().all()
    assert max(asked) <= process.bounds[1] + 1e-9
