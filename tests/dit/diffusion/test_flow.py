"""Flows: paths, what follows from a prediction, times and loss (arXiv 2401.08740)."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats
from torch import Tensor

from dit.diffusion.build import build_process
from dit.diffusion.config import FlowConfig, ProcessConfig
from dit.diffusion.flow import Flow, FlowPrediction
from dit.diffusion.process import Process

PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "noise", "data")
TIMES = torch.tensor([0.002, 0.1, 0.5, 0.8, 0.998], dtype=torch.float64)
SHAPE = (5, 3, 4, 4)
MEAN, DEVIATION = 0.7, 0.4
"""Of the Gaussian data, for which everything is known in closed form."""


def flow(path: str = "linear", predict: str = "velocity", **fields: Any) -> Flow:
    return Flow.from_config(FlowConfig.model_validate({"path": path, "predict": predict} | fields))


def numbers(*names: int) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in names]


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def mixed(path: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of data and noise, and their derivatives by autograd, from the formulas as SiT's paper writes them."""
    t = t.clone().requires_grad_()
    if path == "linear":
        alpha, sigma = t, 1 - t
    elif path == "gvp":
        alpha, sigma = torch.sin(math.pi * t / 2), torch.cos(math.pi * t / 2)
    else:
        alpha = torch.exp(-((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.05)
        sigma = torch.sqrt(1 - alpha**2)
    alpha_prime, sigma_prime = (torch.autograd.grad(w.sum(), t, retain_graph=True)[0] for w in (alpha, sigma))
    return alpha.detach(), sigma.detach(), alpha_prime, sigma_prime


def exact(path: str, x: Tensor, t: Tensor) -> tuple[FlowPrediction, Tensor]:
    """The means of velocity, noise and data given x_t, and the score, for N(MEAN, DEVIATION^2 I): x_t is Gaussian."""
    alpha, sigma, alpha_prime, sigma_prime = (column(each) for each in mixed(path, t))
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    x0 = MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)
    noise = sigma / variance * (x - alpha * MEAN)
    return FlowPrediction(alpha_prime * x0 + sigma_prime * noise, noise, x0), -(x - alpha * MEAN) / variance


@pytest.mark.parametrize("path", PATHS)
def test_weights_and_their_derivatives_are_the_papers(path: str) -> None:
    process = flow(path)
    found = [weight(TIMES) for weight in (process.alpha, process.sigma, process.alpha_prime, process.sigma_prime)]
    for ours, theirs in zip(found, mixed(path, TIMES), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_time_is_0_at_the_noise_and_1_at_the_data(path: str) -> None:
    process, ends = flow(path), torch.tensor([0.0, 1.0])
    start = math.exp(-19.9 / 4 - 0.05) if path == "vp" else 0  # VP never forgets the data
    assert process.alpha(ends).tolist() == pytest.approx([start, 1], abs=1e-12)
    assert process.sigma(ends).tolist() == pytest.approx([math.sqrt(1 - start**2), 0], abs=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_velocity_noise_and_data_follow_from_any_of_them(path: str, predict: str) -> None:
    x = numbers(0)[0]
    theirs, score = exact(path, x, TIMES)
    outputs = dict(zip(PREDICTIONS, theirs, strict=True))
    found = flow(path, predict).predict(lambda *_: outputs[predict], x, TIMES, None)
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flow(path).score(found.velocity, x, TIMES), score, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_everything_is_finite_and_right_at_the_first_and_the_last_time(path: str, predict: str) -> None:
    process, x = flow(path, predict), numbers(0)[0]
    ends = torch.tensor(process.bounds, dtype=torch.float64)
    assert (process.bounds[0] == 0) == (predict != "noise" or path == "vp")
    assert (process.bounds[1] == 1) == (predict != "data" and path != "vp")
    theirs, _ = exact(path, x[:2], ends)
    outputs = dict(zip(PREDICTIONS, theirs, strict=True))
    found = process.predict(lambda *_: outputs[predict], x[:2], ends, None)
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_score_of_gvp_is_finite_near_the_data_where_alpha_does_not_grow() -> None:
    x, t = numbers(0)[0], torch.full((5,), 1 - 1e-9, dtype=torch.float64)
    (velocity, _, _), score = exact("gvp", x, t)
    torch.testing.assert_close(flow("gvp").score(velocity, x, t), score, rtol=1e-5, atol=1e-5)


def test_the_network_is_given_its_time_unscaled_and_its_first_channels_count() -> None:
    x, seen = numbers(0)[0].float(), []

    def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.extend([x, t, y])
        return torch.cat([x, torch.full_like(x, torch.nan)], 1).bfloat16()

    y = torch.arange(5)
    found = flow().predict(model, x, TIMES, y)
    assert seen[0] is x
    assert seen[2] is y
    torch.testing.assert_close(seen[1], TIMES.float())
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in found)
    terms = flow().training_terms(model, x, x, TIMES, y)
    assert all(term.dtype == torch.float32 and term.isfinite().all() and term.shape == (5,) for term in terms.values())


def test_time_the_other_way_round_reverses_the_velocity() -> None:
    """REPA and others: t' = 1 - t is 1 at the noise, x = (1 - t') x0 + t' eps, v' = eps - x0 (arXiv 2410.06940)."""
    x0, noise = numbers(0, 1)
    reversed_time = 1 - TIMES
    x = column(1 - reversed_time) * x0 + column(reversed_time) * noise
    torch.testing.assert_close(flow().q_sample(x0, TIMES, noise), x)
    terms = flow().training_terms(lambda *_: -(noise - x0), x0, noise, TIMES, None)
    assert terms["loss"].tolist() == [0] * 5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_loss_is_the_mean_squared_error_of_what_is_predicted(path: str, predict: str) -> None:
    x0, noise, output = numbers(0, 1, 2)
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append(x)
        return output

    process: Process = flow(path, predict)
    terms = process.training_terms(model, x0, noise, TIMES, None)
    alpha, sigma, alpha_prime, sigma_prime = (column(each) for each in mixed(path, TIMES))
    torch.testing.assert_close(seen[0], alpha * x0 + sigma * noise)
    target = {"velocity": alpha_prime * x0 + sigma_prime * noise, "noise": noise, "data": x0}[predict]
    torch.testing.assert_close(terms["loss"], ((output - target) ** 2).mean((1, 2, 3)))
    assert terms.keys() == {"loss", "mse"}
    assert terms["loss"] is terms["mse"]


def test_cosine_term_is_that_of_a_loop_over_positions() -> None:
    x0, noise, output = numbers(0, 1, 2)
    terms = flow(cosine=0.5).training_terms(lambda *_: output, x0, noise, TIMES, None)
    target = x0 - noise
    for row in range(5):
        gaps = []
        for i in range(4):
            for j in range(4):
                a, b = output[row, :, i, j], target[row, :, i, j]
                gaps.append(1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
        assert float(terms["cosine"][row]) == pytest.approx(sum(gaps) / 16, rel=1e-9)
    torch.testing.assert_close(terms["loss"], terms["mse"] + 0.5 * terms["cosine"])
    same = flow(cosine=0.5).training_terms(lambda *_: target, x0, noise, TIMES, None)
    assert same["loss"].tolist() == pytest.approx([0] * 5, abs=1e-12)


def test_cosine_term_has_a_gradient_of_order_1_at_a_prediction_of_0() -> None:
    """Models predict 0 before their first step, where the cosine itself has no gradient."""
    x0, noise = numbers(0, 1)
    output = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    terms = flow(cosine=1.0).training_terms(lambda *_: output, x0, noise, TIMES, None)
    assert terms["cosine"].tolist() == [1] * 5
    terms["cosine"].sum().backward()
    assert output.grad is not None
    length = (x0 - noise).norm(dim=1)
    torch.testing.assert_close(output.grad.norm(dim=1), 10 / length / 16)  # of the mean over 16 positions
    towards = output.grad * (noise - x0)
    assert (towards.sum(1) > 0).all()


def test_uniform_times_are_the_uniform_numbers() -> None:
    u = torch.tensor([0.0, 0.25, 1 - 2**-53], dtype=torch.float64)
    found = flow().sample_t(u)
    assert found.dtype == torch.float64
    assert found.tolist() == u.tolist()


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-0.4, 1.3)])
def test_logit_normal_times_have_the_quantiles_of_their_law(mean: float, deviation: float) -> None:
    u = torch.tensor([0.0013, 0.1587, 0.5, 0.9, 0.999], dtype=torch.float64)
    found = flow(times="logit_normal", logit_mean=mean, logit_std=deviation).sample_t(u)
    for t, probability in zip(found.tolist(), u.tolist(), strict=True):
        assert math.log(t / (1 - t)) == pytest.approx(stats.norm.ppf(probability, mean, deviation), rel=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("fields", [{}, {"times": "logit_normal", "logit_std": 20}])
def test_times_of_training_stay_where_the_network_can_be_evaluated(
    path: str, predict: str, fields: dict[str, Any]
) -> None:
    """VP is trained nearer to the data than it is sampled, as in SiT."""
    process = flow(path, predict, **fields)
    first, last = process.bounds
    ends = process.sample_t(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist()
    assert ends == pytest.approx([first, 1 - 1e-5 if path == "vp" else last], abs=1e-15)
    x0, noise = numbers(0, 1)
    terms = process.training_terms(lambda x, *_: x, x0[:2], noise[:2], torch.tensor(ends, dtype=torch.float64), None)
    assert terms["loss"].isfinite().all()


def test_config_knows_its_kind() -> None:
    read = TypeAdapter[ProcessConfig](ProcessConfig).validate_python
    config = read({"kind": "flow", "path": "gvp", "predict": "data"})
    assert build_process(config) == Flow(FlowConfig(path="gvp", predict="data"))
    for fields in ({"path": "cubic"}, {"predict": "score"}, {"logit_std": 0}, {"cosine": -1}, {"p_mean": 0}):
        with pytest.raises(ValidationError):
            FlowConfig.model_validate(fields)
    with pytest.raises(ValidationError, match="need times: logit_normal"):
        FlowConfig(logit_mean=-0.5)
