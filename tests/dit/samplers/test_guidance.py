"""Guidance that depends on time, and guidance by another model."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit.diffusion.config import EDMConfig, FlowConfig
from dit.diffusion.edm import EDM
from dit.diffusion.flow import Flow
from dit.diffusion.process import Denoiser
from dit.samplers.guidance import Guided, power_cosine

X = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([0, 100, 400, 999])
LABELS = torch.tensor([1, 2, 3, 4])
NULL = torch.full((4,), 10)


class Counting:
    """A network that remembers which labels it was asked for."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        self.labels.append(y.tolist())
        return torch.cat([x * y.reshape(-1, 1, 1, 1), x + t.reshape(-1, 1, 1, 1)], 1)


@pytest.mark.parametrize(("t", "scale"), [(400, 1.14), (100, 3.50), (1000, 1.0), (0, 4.4)])
def test_power_cosine_has_the_published_values(t: int, scale: float) -> None:
    assert float(power_cosine(4.4, torch.tensor([t]))) == pytest.approx(scale, abs=0.005)


def test_power_cosine_is_the_formula_and_never_falls_towards_the_data() -> None:
    t = torch.arange(1000)
    found = power_cosine(4.6, t)
    expected = [1 + 3.6 * (1 - math.cos(math.pi * (1 - i / 1000) ** 4)) / 2 for i in range(1000)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert (found[1:] <= found[:-1]).all()


def test_each_sample_is_guided_by_the_scale_of_its_time() -> None:
    model = Counting()
    found = Guided(model, 4.4, null_label=10, schedule="power_cosine")(X, TIMES, LABELS)
    label, null = model(X, TIMES, LABELS), model(X, TIMES, NULL)
    for i, t in enumerate(TIMES):
        scale = 1 + 3.4 * (1 - math.cos(math.pi * (1 - float(t) / 1000) ** 4)) / 2
        torch.testing.assert_close(found[i, :3], null[i, :3] + scale * (label[i, :3] - null[i, :3]))
        assert torch.equal(found[i, 3:], label[i, 3:])


def test_in_a_flows_time_the_scale_grows_towards_the_data_too() -> None:
    guided = Guided(Counting(), 4.4, null_label=10, schedule="power_cosine")
    found = replace(guided, flow=True)(X, torch.tensor([1.0, 0.9, 0.6, 0.001]), LABELS)
    torch.testing.assert_close(found[:, :3], guided(X, TIMES, LABELS)[:, :3])


def test_outside_the_interval_the_network_answers_alone() -> None:
    model = Counting()
    found = Guided(model, 3.0, null_label=10, channels="all", interval=(100, 400))(X, TIMES, LABELS)
    assert model.labels == [[1, 2, 3, 4, 10, 10]]
    always = Guided(model, 3.0, null_label=10, channels="all")(X, TIMES, LABELS)
    plain = model(X, TIMES, LABELS)
    for i, inside in enumerate([False, True, True, False]):
        assert torch.equal(found[i], (always if inside else plain)[i])
    assert not torch.allclose(always, plain)


def test_no_second_pass_where_nobody_is_inside() -> None:
    model = Counting()
    guided = Guided(model, 3.0, null_label=10, schedule="power_cosine", interval=(500, 600))
    found = guided(X, TIMES, LABELS)
    assert model.labels == [[1, 2, 3, 4]]
    assert torch.equal(found, model(X, TIMES, LABELS))


def test_interval_is_in_the_networks_own_time() -> None:
    model, t = Counting(), torch.tensor([-1.5, -0.2, 0.0, 1.1])
    Guided(model, 3.0, null_label=10, interval=(-0.5, 0.5))(X, t, LABELS)
    assert model.labels == [[1, 2, 3, 4, 10, 10]]


def other(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """A worse network than `Counting`."""
    return torch.cat([x.sin() * (1 if y is None else y.reshape(-1, 1, 1, 1)), x], 1)


def test_a_guide_replaces_the_pass_for_the_null_label() -> None:
    model, guide = Counting(), Counting()
    found = Guided(model, 4.4, null_label=10, schedule="power_cosine", guide=guide)(X, TIMES, LABELS + 1)
    assert (model.labels, guide.labels) == ([LABELS.add(1).tolist()], [LABELS.add(1).tolist()])
    assert torch.equal(found, model(X, TIMES, LABELS + 1))  # both are the same network
    found = Guided(model, 4.4, null_label=10, schedule="power_cosine", guide=other)(X, TIMES, LABELS)
    good, bad = model(X, TIMES, LABELS), other(X, TIMES, LABELS)
    for i, t in enumerate(TIMES):
        scale = 1 + 3.4 * (1 - math.cos(math.pi * (1 - float(t) / 1000) ** 4)) / 2
        torch.testing.assert_close(found[i, :3], bad[i, :3] + scale * (good[i, :3] - bad[i, :3]))
        assert torch.equal(found[i, 3:], good[i, 3:])


def test_a_guide_needs_no_labels() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is None
        return x.exp()

    found = Guided(model, 2.0, null_label=0, channels="all", guide=other)(X, TIMES, None)
    torch.testing.assert_close(found, 2 * X.exp() - other(X, TIMES, None)[:, :4])


def test_a_guide_is_asked_inside_the_interval_alone() -> None:
    model, guide = Counting(), Counting()
    guided = Guided(model, 3.0, null_label=10, channels="all", interval=(100, 400), guide=guide)
    found = guided(X, TIMES, LABELS)
    assert (model.labels, guide.labels) == ([[1, 2, 3, 4]], [[2, 3]])
    assert torch.equal(found, model(X, TIMES, LABELS))
    guided(X, torch.full((4,), 500), LABELS)
    assert guide.labels == [[2, 3]]
    assert torch.equal(Guided(model, 1.0, null_label=10, guide=guide)(X, TIMES, LABELS), model(X, TIMES, LABELS))
    assert guide.labels == [[2, 3]]


T = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)


def of_flow(config: FlowConfig) -> Callable[[Denoiser], Tensor]:
    return lambda model: Flow(config).predict(model, X.double(), T, LABELS).x0


@pytest.mark.parametrize(
    "data",
    [
        *(of_flow(FlowConfig(path=path)) for path in ("linear", "gvp", "vp")),
        *(of_flow(FlowConfig(predict=predict)) for predict in ("noise", "data")),
        lambda model: EDM.from_config(EDMConfig()).denoise(model, X.double(), T, LABELS),
    ],
)
def test_guiding_what_a_network_predicts_is_guiding_the_expected_data(data: Callable[[Denoiser], Tensor]) -> None:
    """Karras et al., arXiv 2406.02507, equation 2: D = D_guide + s (D_model - D_guide)."""

    def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return x.cos() * t.reshape(-1, 1, 1, 1)

    def guide(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return other(x, t, y)[:, :4]

    found = data(Guided(model, 2.5, null_label=10, channels="all", guide=guide))
    torch.testing.assert_close(found, data(guide) + 2.5 * (data(model) - data(guide)))
