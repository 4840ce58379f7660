import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dit.diffusion.config import DiffusionConfig
from dit.diffusion.gaussian import GaussianDiffusion
from dit.diffusion.losses import discretised_gaussian_log_likelihood, normal_kl
from dit.diffusion.process import Process
from dit.diffusion.respace import kept_timesteps
from dit.diffusion.schedule import betas
from storage.errors import InputError

DIFFUSION = GaussianDiffusion.from_config(DiffusionConfig())
SHAPE = (6, 4, 3, 3)
T = torch.tensor([0, 1, 2, 400, 998, 999])


def numbers(*names: int, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in names]


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def test_tables() -> None:
    expected = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(betas(DiffusionConfig()).numpy(), expected, rtol=1e-13)
    np.testing.assert_allclose(DIFFUSION.alphas_cumprod.numpy(), np.cumprod(1 - expected), rtol=1e-12)
    assert DIFFUSION.alphas_cumprod.dtype == torch.float64
    assert float(DIFFUSION.alphas_cumprod[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
    assert len(DIFFUSION) == 1000
    assert DIFFUSION.posterior_variance[0] == 0
    assert DIFFUSION.posterior_log_variance[0] == DIFFUSION.posterior_log_variance[1]


@pytest.mark.parametrize("fields", [{"beta_start": 0.03}, {"beta_end": 1.0}, {"steps": 1}, {"schedule": "cubic"}])
def test_config_refuses_what_makes_no_process(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        DiffusionConfig.model_validate(fields)


def test_q_sample_has_the_closed_form_moments() -> None:
    x0, noise = numbers(0, 1)
    kept = column(torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[T])
    torch.testing.assert_close(DIFFUSION.q_sample(x0, T, noise), kept.sqrt() * x0 + (1 - kept).sqrt() * noise)


def test_q_sample_is_the_composition_of_its_steps() -> None:
    """Variance and mean after t steps of x <- sqrt(1 - beta) x + sqrt(beta) noise."""
    mean, variance = 1.0, 0.0
    for step, beta in enumerate(np.linspace(1e-4, 0.02, 1000)):
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        if step in (0, 10, 999):
            one, t = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([step])
            assert float(DIFFUSION.q_sample(one, t, 0 * one)) == pytest.approx(mean, rel=1e-10)
            assert float(DIFFUSION.q_sample(0 * one, t, one)) ** 2 == pytest.approx(variance, rel=1e-10)


def test_posterior_is_bayes_rule() -> None:
    x0, x_t = numbers(0, 1)
    t = T[1:]
    x0, x_t = x0[1:], x_t[1:]
    beta, before = column(DIFFUSION.betas[t]), column(DIFFUSION.alphas_cumprod[t - 1])
    # prior N(sqrt(before) x0, 1 - before), likelihood N(x_t; sqrt(1 - beta) x, beta)
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x0 / (1 - before) + (1 - beta).sqrt() * x_t / beta) / precision
    found_mean, found_log_variance = DIFFUSION.q_posterior(x0, x_t, t)
    torch.testing.assert_close(found_mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_log_variance, -precision.log(), rtol=1e-9, atol=1e-9)


def test_posterior_of_the_first_step_is_the_data() -> None:
    x0, x_t = numbers(0, 1)
    torch.testing.assert_close(DIFFUSION.q_posterior(x0, x_t, 0 * T)[0], x0)


def test_predict_x0_undoes_q_sample() -> None:
    x0, noise = numbers(0, 1)
    torch.testing.assert_close(DIFFUSION.predict_x0(DIFFUSION.q_sample(x0, T, noise), T, noise), x0)


def test_learned_variance_lies_between_posterior_and_beta() -> None:
    ones = torch.ones(SHAPE, dtype=torch.float64)
    beta, posterior = column(DIFFUSION.betas[T]), column(DIFFUSION.posterior_log_variance[T]).exp()
    for v, expected in ((1, beta), (-1, posterior), (0, (beta * posterior).sqrt())):
        torch.testing.assert_close(DIFFUSION.log_variance(v * ones, T).exp(), expected * ones)


def test_without_a_learned_variance_it_is_the_posterior_one() -> None:
    eps, x_t = numbers(0, 1)
    found = DIFFUSION.predict(eps, x_t, T)
    torch.testing.assert_close(found.log_variance.exp()[1:, 0, 0, 0], DIFFUSION.posterior_variance[T][1:])
    assert DIFFUSION.training_loss(eps, x_t, eps, T).keys() == {"loss", "mse"}


def test_output_with_other_channels_is_refused() -> None:
    (x,) = numbers(0)
    with pytest.raises(InputError, match="5 channels; the data needs 4 or 8"):
        DIFFUSION.predict(torch.zeros(6, 5, 3, 3), x, T)


def test_normal_kl_is_torchs() -> None:
    m1, lv1, m2, lv2 = numbers(0, 1, 2, 3)
    expected = kl_divergence(Normal(m1, (0.5 * lv1).exp()), Normal(m2, (0.5 * lv2).exp()))
    torch.testing.assert_close(normal_kl(m1, lv1, m2, lv2), expected)


@pytest.mark.parametrize(("mean", "log_variance"), [(0.0, -2.0), (0.97, -4.0), (-1.5, -1.0), (0.001, -9.0)])
def test_discretised_likelihood_sums_to_one_and_is_scipys(mean: float, log_variance: float) -> None:
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    found = discretised_gaussian_log_likelihood(x, torch.tensor(mean), torch.tensor(log_variance)).exp()
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    edges = np.concatenate([[-np.inf], (x.numpy()[1:] + x.numpy()[:-1]) / 2, [np.inf]])
    expected = np.diff(stats.norm.cdf(edges, mean, math.exp(0.5 * log_variance)))
    np.testing.assert_allclose(found.numpy(), np.maximum(expected, 1e-12), rtol=1e-4, atol=2e-12)


def test_discretised_likelihood_keeps_its_digits_in_float32_on_both_sides() -> None:
    x, zero = torch.tensor([-0.5, 0.5]), torch.zeros(2)
    below, above = discretised_gaussian_log_likelihood(x, zero, zero - 4.5).tolist()
    assert below == above
    assert below == pytest.approx(math.log(stats.norm.pdf(0.5 / math.exp(-2.25)) * 2 / 255 / math.exp(-2.25)), abs=1e-2)


def test_loss_terms_against_independent_formulae() -> None:
    x0, noise, eps, v = numbers(0, 1, 2, 3)
    x0, v = x0.clamp(-0.9, 0.9), v.clamp(-1, 1)
    terms = DIFFUSION.training_loss(torch.cat([eps, v], 1), x0, noise, T)
    torch.testing.assert_close(terms["mse"], (noise - eps).pow(2).mean((1, 2, 3)))
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vlb"])

    beta, kept = column(DIFFUSION.betas[T]), column(DIFFUSION.alphas_cumprod[T])
    x_t = kept.sqrt() * x0 + (1 - kept).sqrt() * noise
    mean = (x_t - beta / (1 - kept).sqrt() * eps) / (1 - beta).sqrt()  # DDPM, equation 11
    true_mean = (x_t - beta / (1 - kept).sqrt() * noise) / (1 - beta).sqrt()
    small = column(DIFFUSION.posterior_variance[T.clamp(min=1)])
    variance = beta ** ((v + 1) / 2) * small ** ((1 - v) / 2)
    kl = kl_divergence(Normal(true_mean, small.sqrt()), Normal(mean, variance.sqrt()))
    bits = kl.mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(terms["vlb"][1:], bits[1:], rtol=1e-6, atol=1e-8)

    normal = Normal(mean[0], variance[0].sqrt())
    bin_probability = normal.cdf(x0[0] + 1 / 255) - normal.cdf(x0[0] - 1 / 255)
    nll = -(bin_probability.clamp(min=1e-12).log2()).mean()
    assert float(terms["vlb"][0]) == pytest.approx(float(nll), rel=1e-6)


def test_bound_teaches_the_variance_and_not_the_noise() -> None:
    x0, noise, output = *numbers(0, 1), *numbers(2, shape=(6, 8, 3, 3))
    output.requires_grad_()
    DIFFUSION.training_loss(output, x0, noise, T)["vlb"].sum().backward()
    assert output.grad is not None
    assert not output.grad[:, :4].any()
    assert output.grad[1:, 4:].all()


def test_perfect_noise_with_the_posterior_variance_has_no_loss_after_the_first_step() -> None:
    x0, noise = numbers(0, 1)
    terms = DIFFUSION.training_loss(torch.cat([noise, 0 * noise - 1], 1), x0, noise, T)
    assert terms["loss"][1:].abs().max() < 1e-9
    assert terms["loss"][0] > 0


def test_training_terms_call_the_model_with_original_timesteps() -> None:
    x0, noise = numbers(0, 1)
    process: Process = DIFFUSION.respaced(250)
    t, y = torch.tensor([0, 1, 2, 100, 248, 249]), torch.arange(6)
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        seen.extend([x, t, y])
        return torch.cat([x, x], 1)

    terms = process.training_terms(model, x0, noise, t, y)
    assert seen[1].tolist() == [kept_timesteps(1000, 250)[i] for i in t]
    assert torch.equal(seen[2], y)
    torch.testing.assert_close(terms["mse"], (noise - seen[0]).pow(2).mean((1, 2, 3)))


def test_low_precision_output_gives_a_loss_in_the_precision_of_the_data() -> None:
    x0, noise = (x.float() for x in numbers(0, 1))
    terms = DIFFUSION.training_loss(torch.zeros(6, 8, 3, 3, dtype=torch.bfloat16), x0, noise, T)
    assert all(term.dtype == torch.float32 and term.shape == (6,) for term in terms.values())


def test_timesteps_from_uniform_numbers() -> None:
    u = torch.tensor([0.0, 0.0009999, 0.001, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert DIFFUSION.sample_t(u).tolist() == [0, 0, 1, 500, 999]


@pytest.mark.parametrize(
    ("spacing", "start", "end"),
    [(250, [0, 4, 8, 12, 16], [995, 999]), ("250", [0, 4, 8, 12, 16], [995, 999]), ("ddim50", [0, 20, 40], [960, 980])],
)
def test_kept_timesteps(spacing: int | str, start: list[int], end: list[int]) -> None:
    kept = kept_timesteps(1000, spacing)
    assert kept[: len(start)] == start
    assert kept[-len(end) :] == end
    assert len(kept) == int(str(spacing).removeprefix("ddim"))


def test_strides_are_added_up_in_floating_point_as_published() -> None:
    """Every number of steps, against a plain loop; and how often it matters, as docs/numerics.md says."""
    unlike = {}
    for count in range(2, 1001):
        place, expected = 0.0, []
        for _ in range(count):
            expected.append(round(place))
            place += 999 / (count - 1)
        assert kept_timesteps(1000, count) == expected
        exact = [round(Fraction(999 * i, count - 1)) for i in range(count)]
        gaps = [abs(a - b) for a, b in zip(expected, exact, strict=True) if a != b]
        if gaps:
            unlike[count] = gaps
    assert kept_timesteps(1000, 21)[10] == 499
    assert len(unlike) == 283
    assert all(count % 2 for count in unlike)
    assert max(map(len, unlike.values())) == 19
    assert max(map(max, unlike.values())) == 1


@pytest.mark.parametrize("spacing", [0, 1, 1001, -5, "x", "ddim", "ddim300", "1.5"])
def test_spacing_that_does_not_fit(spacing: int | str) -> None:
    with pytest.raises(InputError, match=str(spacing)):
        kept_timesteps(1000, spacing)


def test_respaced_process_visits_the_same_noise_levels() -> None:
    few = DIFFUSION.respaced(250)
    assert len(few) == 250
    torch.testing.assert_close(few.alphas_cumprod, DIFFUSION.alphas_cumprod[few.timesteps], rtol=1e-12, atol=0)
    kept = DIFFUSION.alphas_cumprod[kept_timesteps(1000, 250)].numpy()
    np.testing.assert_allclose(few.betas[1:].numpy(), 1 - kept[1:] / kept[:-1], rtol=1e-10)
    assert float(few.betas[0]) == pytest.approx(1e-4, rel=1e-10)
    whole = DIFFUSION.respaced(1000)
    torch.testing.assert_close(whole.betas, DIFFUSION.betas, rtol=1e-9, atol=0)
    again = few.respaced(50)
    assert again.timesteps.tolist() == [int(few.timesteps[i]) for i in kept_timesteps(250, 50)]


def test_to_keeps_the_bits() -> None:
    moved = DIFFUSION.to("cpu")
    assert torch.equal(moved.posterior_mean_x0, DIFFUSION.posterior_mean_x0)
    assert DIFFUSION.to("meta").betas.device.type == "meta"
