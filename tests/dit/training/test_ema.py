import numpy as np
import pytest
import torch
from torch import nn

from dit.training.ema import EMA
from storage.errors import InputError


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_average_is_the_closed_form() -> None:
    net = model()
    ema = EMA(net, 0.9)
    history = [net[0].weight.detach().numpy().copy()]
    for step in range(5):
        with torch.no_grad():
            net[0].weight.add_(step + 1.0)
        ema.update(net, step)
        history.append(net[0].weight.detach().numpy().copy())
    weights = [0.9**5, *(0.1 * 0.9 ** (4 - k) for k in range(5))]
    expected = sum(w * h for w, h in zip(weights, history, strict=True))
    np.testing.assert_allclose(ema.state_dict()["0.weight"].numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(ema.state_dict()["1.weight"].numpy(), net[1].weight.detach().numpy())


@pytest.mark.parametrize(("decay", "kept"), [(1.0, True), (0.0, False)])
def test_ends_of_the_range(decay: float, kept: bool) -> None:
    net = model()
    ema, start = EMA(net, decay), net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.zero_()
    ema.update(net, 0)
    assert torch.equal(ema.state_dict()["0.weight"], start) is kept


def test_average_is_float32_of_a_bfloat16_model() -> None:
    net = model().bfloat16()
    ema = EMA(net, 0.999)
    with torch.no_grad():
        net[0].bias.add_(1.0)
    ema.update(net, 0)
    moved = ema.state_dict()["0.bias"] - (net[0].bias.float() - 1)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.full((4,), 0.001), rtol=0, atol=5e-3)
    assert moved.abs().max() > 0


def test_the_model_is_left_alone() -> None:
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    ema = EMA(net, 0.5)
    ema.update(net, 0)
    ema.state_dict()["0.weight"].add_(1)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_what_is_not_trained_is_its_own_average() -> None:
    net = model()
    net[1].requires_grad_(False)
    ema = EMA(net, 0.5)
    with torch.no_grad():
        net[0].weight.add_(1)
    ema.update(net, 0)
    assert list(ema.state_dict()) == ["0.weight", "0.bias"]
    found, weights = ema.weights(), net.state_dict()
    assert found.keys() == weights.keys()
    assert all(found[name].data_ptr() == weights[name].data_ptr() for name in ("1.weight", "1.bias"))
    torch.testing.assert_close(found["0.weight"], weights["0.weight"] - 0.5)
    average = found["0.weight"].clone()
    with ema.exchanged(net):
        assert torch.equal(net[0].weight, average)
        assert torch.equal(net[1].weight, weights["1.weight"])


def test_state_goes_out_and_in() -> None:
    first, second = model(0), model(1)
    ema, other = EMA(first, 0.5), EMA(second, 0.5)
    other.load_state_dict({name: tensor.clone() for name, tensor in ema.state_dict().items()})
    for name, average in other.state_dict().items():
        assert torch.equal(average, first.get_parameter(name))
        assert not torch.equal(average, second.get_parameter(name))


def test_with_a_ramp_the_half_life_is_a_share_of_the_steps_taken() -> None:
    ema = EMA(model(), 0.99, ramp=0.05)
    assert ema.decay_at(0) == 0
    for step in (1, 20, 100, 1000):
        assert ema.decay_at(step) ** (0.05 * step) == pytest.approx(0.5)
    assert ema.decay_at(1400) == ema.decay_at(10**9) == 0.99
    assert EMA(model(), 0.99).decay_at(0) == 0.99


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("0.bias"), "0.bias is missing"),
        (lambda s: s.update(more=torch.ones(1)), "more is unknown"),
        (lambda s: s.update({"1.bias": torch.ones(3)}), r"1.bias has shape \(3,\), not \(2,\)"),
    ],
)
def test_state_of_another_model_is_refused(change: object, reason: str) -> None:
    ema = EMA(model(), 0.5)
    state = ema.state_dict()
    change(state)  # type: ignore[operator]
    with pytest.raises(InputError, match=reason):
        ema.load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_outside_the_range(decay: float) -> None:
    with pytest.raises(InputError, match="ema_decay"):
        EMA(model(), decay)
