"""Adapters against the formula, on models of all kinds."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dit.models.build import build
from dit.models.config import DiTConfig, ModelConfig, diffit_config, diffit_image_config
from dit.models.lora import Lora, adapt, linear_layers, merged

MODELS = (
    DiTConfig(input_size=4, width=32, depth=2, heads=2, num_classes=3),
    diffit_config("S/2", input_size=4),
    diffit_image_config("digits16", num_classes=3),
)
LORA = Lora(rank=3, alpha=5.0)


def random(config: ModelConfig, seed: int = 0) -> nn.Module:
    """A model whose output is not zero."""
    torch.manual_seed(seed)
    model = build(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.05)
    return model


def given(config: ModelConfig) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size, generator=generator)
    return x, torch.tensor([3.0, 500.0]), torch.tensor([0, 2]) if config.num_classes else None


def changed(model: nn.Module, names: list[str]) -> nn.Module:
    """The model with adapters that were trained."""
    adapt(model, names, LORA)
    for name in names:
        nn.init.normal_(model.get_parameter(f"{name}.lora_b"), std=0.1)
    return model


@pytest.mark.parametrize("config", MODELS)
def test_an_adapted_model_starts_as_it_was_and_keeps_its_names(config: ModelConfig) -> None:
    model = random(config)
    before, names = model(*given(config)), dict(model.named_parameters())
    adapt(model, linear_layers(model), LORA)
    assert torch.equal(model(*given(config)), before)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in names.items())
    assert {name.rpartition(".")[2] for name in after.keys() - names.keys()} == {"lora_a", "lora_b"}
    assert linear_layers(model) == {}


@pytest.mark.parametrize("config", MODELS)
def test_merged_weights_are_the_sum_and_compute_the_same(config: ModelConfig) -> None:
    names = [name for number, name in enumerate(linear_layers(random(config))) if number % 3 != 1]
    model = changed(random(config), names)
    state, original = model.state_dict(), random(config).state_dict()
    plain = merged(state, LORA)
    for name, tensor in original.items():
        expected = tensor.double().numpy()
        layer = name.removesuffix(".weight")
        if layer in names:
            a, b = (state[f"{layer}.lora_{part}"].double().numpy() for part in "ab")
            expected = expected + 5 / 3 * np.einsum("or,ri->oi", b, a)
        np.testing.assert_allclose(plain[name].numpy(), expected, rtol=0, atol=1e-7 * np.abs(expected).max() + 1e-9)
    other = build(config).eval()
    other.load_state_dict(plain)
    with torch.no_grad():
        found, expected = other(*given(config)), model(*given(config))
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max() + 1e-6
        assert (expected - random(config)(*given(config))).abs().max() > 1e-2 * expected.abs().max()


def test_the_gradient_is_that_of_the_product() -> None:
    """By the chain rule from the gradient G of the whole weight: scale B^T G for A, and scale G A^T for B."""
    model = changed(random(MODELS[0]), ["blocks.0.attn.qkv"])
    model(*given(MODELS[0])).square().sum().backward()
    whole = build(MODELS[0]).eval()
    whole.load_state_dict(merged(model.state_dict(), LORA))
    whole(*given(MODELS[0])).square().sum().backward()
    gradient = whole.get_parameter("blocks.0.attn.qkv.weight").grad
    a, b = (model.get_parameter(f"blocks.0.attn.qkv.lora_{part}") for part in "ab")
    torch.testing.assert_close(a.grad, 5 / 3 * b.T @ gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.grad, 5 / 3 * gradient @ a.T, rtol=1e-4, atol=1e-6)


def test_a_model_without_adapters_is_left_as_it_is() -> None:
    state = random(MODELS[0]).state_dict()
    assert merged(state, None) == state
