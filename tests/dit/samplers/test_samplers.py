from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from dit.diffusion.config import DiffusionConfig
from dit.diffusion.gaussian import GaussianDiffusion
from dit.samplers.ddim import ddim
from dit.samplers.ddpm import ddpm
from dit.samplers.guidance import Channels, Guided
from dit.samplers.noise import SampleNoise
from dit.samplers.state import last
from storage.errors import InputError

DIFFUSION = GaussianDiffusion.from_config(DiffusionConfig())
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SHAPE = (4, 8, 8)


def in_float64(scheduler: Any) -> Any:
    """Its float32 tables lose digits in 1 - alpha; ours must not be held to those."""
    scheduler.betas = torch.from_numpy(np.linspace(1e-4, 0.02, 1000))
    scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0)
    return scheduler


def smooth(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """A network of noise and variance that depends on everything."""
    wave = torch.sin(t.float() / 100).reshape(-1, 1, 1, 1)
    label = 0.0 if y is None else y.reshape(-1, 1, 1, 1) / 10
    return torch.cat([0.9 * x + 0.1 * wave + label, torch.tanh(x - wave)], 1)


def fixed_noise(step: int) -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("spacing", [1000, 250, "ddim50"])
def test_ddpm_steps_are_diffusers(spacing: int | str) -> None:
    process = DIFFUSION.respaced(spacing)
    scheduler = in_float64(DDPMScheduler(**SCHEDULE, variance_type="learned_range", clip_sample=False))
    timesteps = process.timesteps.tolist()[::-1]
    scheduler.set_timesteps(**({"num_inference_steps": 1000} if spacing == 1000 else {"timesteps": timesteps}))
    assert scheduler.timesteps.tolist() == timesteps
    x = fixed_noise(12345)
    for state in ddpm(process, smooth, x, None, fixed_noise):
        if state.step % 7 == 0:
            t = int(process.timesteps[state.step])
            generator = torch.Generator().manual_seed(state.step)
            expected = scheduler.step(smooth(x, torch.tensor([t] * 2), None), t, x, generator=generator)
            torch.testing.assert_close(state.x, expected.prev_sample, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(state.x0, expected.pred_original_sample, rtol=5e-5, atol=5e-5)
        x = state.x


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_steps_are_diffusers(eta: float) -> None:
    process = DIFFUSION.respaced("ddim50")
    scheduler = in_float64(DDIMScheduler(**SCHEDULE, clip_sample=False))
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == process.timesteps.tolist()[::-1]
    x = fixed_noise(12345)
    for state in ddim(process, smooth, x, None, fixed_noise, eta=eta):
        t = int(process.timesteps[state.step])
        eps = smooth(x, torch.tensor([t] * 2), None)[:, :4]
        generator = torch.Generator().manual_seed(state.step)
        expected = scheduler.step(eps, t, x, eta=eta, generator=generator).prev_sample
        torch.testing.assert_close(state.x, expected, rtol=2e-6, atol=2e-6)
        x = state.x


def exact_noise(mean: float, std: float, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """What a perfect network says if the data is N(mean, std^2)."""
    kept = DIFFUSION.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
    return (1 - kept).sqrt() * (x - kept.sqrt() * mean) / (kept * std**2 + 1 - kept)


def test_ddpm_draws_from_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda _: torch.randn(100, 1, 10, 10, generator=generator)  # noqa: E731
    x = last(ddpm(DIFFUSION, lambda *a: exact_noise(2.0, 0.5, *a), draw(0), None, draw))
    assert float(x.mean()) == pytest.approx(2.0, abs=0.03)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


def test_ddim_carries_noise_to_data() -> None:
    """Its path for Gaussian data ends at mean + std * noise, but for the error of finite steps."""
    x = torch.linspace(-3, 3, 64).reshape(64, 1, 1, 1)
    found = last(ddim(DIFFUSION, lambda *a: exact_noise(2.0, 0.5, *a), x, None, fixed_noise))
    torch.testing.assert_close(found, 2.0 + 0.5 * x, rtol=0, atol=0.03)


def test_states_count_down_and_the_last_is_the_expected_data() -> None:
    process = DIFFUSION.respaced(10)
    for sampler in (ddpm, ddim):
        states = list(sampler(process, smooth, fixed_noise(99), None, fixed_noise))
        assert [state.step for state in states] == list(range(9, -1, -1))
        torch.testing.assert_close(states[-1].x, states[-1].x0, rtol=1e-5, atol=1e-5)
        assert not states[-1].x.requires_grad


def test_step_noise_is_asked_for_once_a_step_and_never_at_the_end() -> None:
    process, asked = DIFFUSION.respaced(5), []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return fixed_noise(step)

    last(ddpm(process, smooth, fixed_noise(99), None, noise))
    assert asked == [4, 3, 2, 1]
    last(ddim(process, smooth, fixed_noise(99), None, noise))
    assert asked == [4, 3, 2, 1]


def test_sampler_leaves_the_caller_s_gradients_on() -> None:
    parameter = torch.ones(1, requires_grad=True)
    for _ in ddpm(DIFFUSION.respaced(3), smooth, fixed_noise(99), None, fixed_noise):
        assert (parameter * 2).requires_grad


def sample(indices: list[int]) -> Tensor:
    noise = SampleNoise(seed=3, indices=indices, shape=SHAPE)
    return last(ddpm(DIFFUSION.respaced(6), smooth, noise.initial(), noise.labels(10), noise))


def test_sample_is_the_same_in_any_batch() -> None:
    whole = sample(list(range(64)))
    for batch in ([5], list(range(3, 10)), [63, 5, 0]):
        assert torch.equal(sample(batch), whole[batch])
    assert len(torch.unique(whole.flatten(1), dim=0)) == 64


def test_sample_noise_draws() -> None:
    noise = SampleNoise(seed=3, indices=range(2000), shape=(1, 2, 2))
    assert noise.initial().shape == (2000, 1, 2, 2)
    assert noise.initial().dtype == torch.float32
    assert not torch.equal(noise.initial(), noise(0))
    assert not torch.equal(noise(1), noise(2))
    counts = np.bincount(noise.labels(10).numpy(), minlength=10)
    assert len(counts) == 10
    assert counts.min() > 140
    assert noise.labels(10).dtype == torch.int64
    assert not torch.equal(SampleNoise(4, range(2000), (1, 2, 2)).initial(), noise.initial())


def guided(scale: float, channels: Channels = "first3") -> Guided:
    return Guided(smooth, scale, null_label=10, channels=channels)


X, TIMES, LABELS = fixed_noise(0), torch.tensor([10, 900]), torch.tensor([1, 7])


def test_guidance_scale_1_is_no_guidance() -> None:
    assert torch.equal(guided(1)(X, TIMES, LABELS), smooth(X, TIMES, LABELS))
    assert torch.equal(guided(1)(X, TIMES, None), smooth(X, TIMES, None))


@pytest.mark.parametrize(("channels", "count"), [("first3", 3), ("all", 4)])
def test_guidance_moves_the_chosen_channels_and_no_other(channels: Channels, count: int) -> None:
    label, null = smooth(X, TIMES, LABELS), smooth(X, TIMES, torch.tensor([10, 10]))
    found = guided(4.0, channels)(X, TIMES, LABELS)
    expected = label.clone()
    expected[:, :count] = null[:, :count] + 4.0 * (label[:, :count] - null[:, :count])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[:, count:], label[:, count:])
    assert not torch.allclose(found[:, :count], label[:, :count])


def test_guidance_scale_0_forgets_the_label() -> None:
    found = guided(0.0, "all")(X, TIMES, LABELS)
    torch.testing.assert_close(found[:, :4], smooth(X, TIMES, torch.tensor([10, 10]))[:, :4])


def test_guidance_needs_labels() -> None:
    with pytest.raises(InputError, match="needs labels"):
        guided(1.5)(X, TIMES, None)
