"""EDM's preconditioning, noise levels and loss (arXiv 2206.00364, table 1)."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats
from torch import Tensor

from dit.diffusion.config import DiffusionConfig, EDMConfig, ProcessConfig
from dit.diffusion.edm import EDM
from dit.diffusion.process import Process

PROCESS = EDM.from_config(EDMConfig())
SIGMAS = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)
SHAPE = (5, 3, 4, 4)


def numbers(*names: int) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in names]


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def test_defaults_are_the_papers() -> None:
    assert (PROCESS.p_mean, PROCESS.p_std, PROCESS.sigma_data) == (-1.2, 1.2, 0.5)


def test_noise_levels_are_log_normal() -> None:
    u = torch.tensor([0.0013, 0.1587, 0.5, 0.9], dtype=torch.float64)
    found = PROCESS.sample_t(u)
    assert found.dtype == torch.float64
    for value, probability in zip(found.tolist(), u.tolist(), strict=True):
        assert value == pytest.approx(stats.lognorm.ppf(probability, 1.2, scale=math.exp(-1.2)), rel=1e-9)


def test_the_ends_of_the_uniform_numbers_give_noise_levels_too() -> None:
    found = PROCESS.sample_t(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert found.isfinite().all()
    assert (found > 0).all()


def test_network_is_given_unit_variance_and_the_quarter_logarithm() -> None:
    x, seen = numbers(0)[0], []

    def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.extend([x, t, y])
        return 0 * x

    y = torch.arange(5)
    PROCESS.denoise(model, x, SIGMAS, y)
    torch.testing.assert_close(seen[0], x / column((SIGMAS**2 + 0.25).sqrt()))
    torch.testing.assert_close(seen[1], SIGMAS.log() / 4)
    assert seen[2] is y


def test_expected_data_is_the_papers_mixture() -> None:
    x, output = numbers(0, 1)
    s = column(SIGMAS)
    expected = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * output
    torch.testing.assert_close(PROCESS.denoise(lambda *_: output, x, SIGMAS, None), expected)


def test_loss_is_the_error_of_the_networks_own_target() -> None:
    """The weight cancels what the preconditioning multiplies: the loss is (F - target)^2 at every level."""
    x0, noise, output = numbers(0, 1, 2)
    process: Process = PROCESS
    terms = process.training_terms(lambda *_: output, x0, noise, SIGMAS, None)
    s = column(SIGMAS)
    skip = 0.25 / (s**2 + 0.25)
    target = (x0 - skip * (x0 + s * noise)) * (s**2 + 0.25).sqrt() / (0.5 * s)
    torch.testing.assert_close(terms["loss"], (output - target).pow(2).mean((1, 2, 3)), rtol=1e-6, atol=1e-6)
    expected = PROCESS.denoise(lambda *_: output, x0 + s * noise, SIGMAS, None)
    torch.testing.assert_close(terms["mse"], (expected - x0).pow(2).mean((1, 2, 3)))


def test_loss_of_an_untrained_network_is_1_at_every_level() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(5, 1, 200, 200, dtype=torch.float64, generator=generator)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    found = PROCESS.training_terms(lambda x, *_: 0 * x, x0, noise, SIGMAS, None)["loss"]
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0.03, atol=0)


def test_loss_of_the_best_network_for_gaussian_data_is_the_posterior_variance() -> None:
    """For N(0, 1) data the best D is x / (1 + sigma^2), and its error sigma^2 / (1 + sigma^2)."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 1, 200, 200, dtype=torch.float64, generator=generator) for _ in range(2))
    s = column(SIGMAS)

    def best(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        x = x * (s**2 + 0.25).sqrt()
        return (x / (1 + s**2) - 0.25 / (s**2 + 0.25) * x) * (s**2 + 0.25).sqrt() / (0.5 * s)

    found = PROCESS.training_terms(best, x0, noise, SIGMAS, None)
    torch.testing.assert_close(found["mse"], SIGMAS**2 / (1 + SIGMAS**2), rtol=0.03, atol=0)


def test_precision_is_that_of_the_data() -> None:
    x0, noise = (x.float() for x in numbers(0, 1))
    low = torch.zeros(SHAPE, dtype=torch.bfloat16)
    terms = PROCESS.training_terms(lambda *_: low, x0, noise, SIGMAS, None)
    assert all(term.dtype == torch.float32 and term.shape == (5,) for term in terms.values())


def test_config_knows_its_kind() -> None:
    read = TypeAdapter[ProcessConfig](ProcessConfig).validate_python
    assert read({"kind": "edm", "p_std": 1.0}) == EDMConfig(p_std=1.0)
    assert read({"kind": "gaussian"}) == DiffusionConfig()
    for fields in ({"p_std": 0}, {"sigma_data": -1}, {"schedule": "linear"}):
        with pytest.raises(ValidationError):
            EDMConfig.model_validate(fields)
