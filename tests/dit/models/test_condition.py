"""The other ways in which a DiffiT can see its condition: in the MLP, or as a token of its own."""

from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from random_dit import randomise
from torch import Tensor, nn

from dit.models.build import build
from dit.models.choice import DataSpec, DiffiTChoice, DiffiTImageChoice
from dit.models.config import ConditionKind, DiffiTConfig, DiffiTImageConfig, ModelConfig
from dit.models.cost import cost
from dit.models.tmsa import TMSA, TimeMlp, TMSABlock

KINDS = get_args(ConditionKind)
LATENT = DiffiTConfig(input_size=8, width=48, depth=2, heads=3, num_classes=10)
IMAGE = DiffiTImageConfig(input_size=8, stem_width=32, widths=(32,), depths=(1,), window=4, time_width=16)
WIDTH, HEADS, E, WINDOW = 24, 4, 10, 3
N = WINDOW**2


def attention(condition: ConditionKind) -> TMSA:
    layer = TMSA(WIDTH, HEADS, E, WINDOW, condition)
    randomise(layer, std=0.5)
    return layer


def drawn(config: ModelConfig, condition: ConditionKind) -> nn.Module:
    model = build(config.model_copy(update={"condition": condition}))
    randomise(model)
    return model


def given(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    side = config.input_size
    x = torch.randn(3, config.in_channels, side, side, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0, 5, 10]) if config.num_classes else None


def numpy_of(layer: nn.Linear | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    assert layer is not None
    return layer.weight.detach().double().numpy().T, layer.bias.detach().double().numpy()


def naive(layer: TMSA, x: Tensor, c: Tensor, condition: ConditionKind) -> tuple[NDArray[np.float64], ...]:
    """Weights (h, N, K) and output (N, D) of one window, number by number, in float64."""
    tokens = list(x.double().numpy())
    given = c.double().numpy()
    if condition == "token":
        weight, bias = numpy_of(layer.time_token)
        tokens.append(given @ weight + bias)
    weight, bias = numpy_of(layer.qkv)
    projected = [token @ weight + bias for token in tokens]
    if condition == "tmsa":
        weight, bias = numpy_of(layer.time_qkv)
        projected = [each + given @ weight + bias for each in projected]
    size, table = WIDTH // HEADS, layer.bias.table.detach().double().numpy()
    weights, heads = np.zeros((HEADS, N, len(tokens))), np.zeros((N, WIDTH))
    for h in range(HEADS):
        q, k, v = ([each[part * WIDTH :][h * size : (h + 1) * size] for each in projected] for part in range(3))
        for i in range(N):
            logits = [q[i] @ key / size**0.5 for key in k]
            for j in range(N):
                dy, dx = i // WINDOW - j // WINDOW, i % WINDOW - j % WINDOW
                logits[j] += table[(dy + WINDOW - 1) * (2 * WINDOW - 1) + dx + WINDOW - 1, h]
            weights[h, i] = np.exp(logits) / np.exp(logits).sum()
            heads[i, h * size : (h + 1) * size] = weights[h, i] @ np.stack(v)
    weight, bias = numpy_of(layer.proj)
    return weights, heads @ weight + bias


@pytest.mark.parametrize("condition", KINDS)
def test_attention_and_its_weights_are_those_of_plain_loops(condition: ConditionKind) -> None:
    """With two windows of each of two images."""
    layer, x, c = attention(condition), torch.randn(4, N, WIDTH), torch.randn(2, E)
    out, weights = layer(x, c), layer.weights(x, c)
    assert weights.shape == (4, HEADS, N, N + (condition == "token"))
    for window in range(4):
        attended, expected = naive(layer, x[window], c[window // 2], condition)
        np.testing.assert_allclose(out[window].detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weights[window].detach().numpy(), attended, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("condition", KINDS)
def test_attention_sees_the_condition_unless_the_mlp_does(condition: ConditionKind) -> None:
    layer, x = attention(condition), torch.randn(2, N, WIDTH)
    one, other = (layer.weights(x, torch.full((2, E), value)) for value in (0.0, 1.0))
    assert torch.equal(one, other) is (condition == "mlp")
    assert [layer.time_qkv is not None, layer.time_token is not None] == [condition == "tmsa", condition == "token"]


def test_hidden_units_of_the_mlp_see_the_condition() -> None:
    block = TMSABlock(WIDTH, HEADS, E, WINDOW, 4.0, "mlp")
    randomise(block)
    x, c = torch.randn(4, N, WIDTH), torch.randn(2, E)
    assert isinstance(block.mlp, TimeMlp)
    middle = x + block.attn(torch.nn.functional.layer_norm(x, (WIDTH,), eps=1e-6), c)
    normed, expected = torch.nn.functional.layer_norm(middle, (WIDTH,), eps=1e-6), middle.clone()
    for window in range(4):
        together = nn.Linear(WIDTH + E, 4 * WIDTH)  # of tokens and condition side by side
        together.weight.data = torch.cat([block.mlp.fc1.weight, block.mlp.time_fc1.weight], 1)
        together.bias.data = block.mlp.fc1.bias + block.mlp.time_fc1.bias
        rows = torch.cat([normed[window], c[window // 2].expand(N, -1)], 1)
        expected[window] += block.mlp.fc2(nn.GELU(approximate="tanh")(together(rows)))
    torch.testing.assert_close(block(x, c), expected)


@pytest.mark.parametrize("condition", KINDS)
@pytest.mark.parametrize("config", [LATENT, IMAGE], ids=["latent", "image"])
def test_every_parameter_learns_and_the_time_reaches_the_output(config: ModelConfig, condition: ConditionKind) -> None:
    model = drawn(config, condition)
    x, t, y = given(config)
    out = model(x, t, y)
    assert ((model(x, t + 0.5, y) - out).abs() > 0).float().mean() > 0.99
    out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("condition", KINDS)
def test_untrained_models_predict_zero(condition: ConditionKind) -> None:
    for config in (LATENT, IMAGE):
        model = build(config.model_copy(update={"condition": condition}))
        assert not model(*given(config)).any()


def test_costs_of_a_block_by_hand() -> None:
    """Parameters and multiply-accumulates that the condition adds to the plain block, which is that of `mlp` less."""
    found = {kind: cost(LATENT.model_copy(update={"condition": kind})) for kind in KINDS}
    d, n, depth = LATENT.width, LATENT.tokens, LATENT.depth
    of_condition = {"tmsa": 3 * d * (d + 1), "mlp": 4 * d * (d + 1), "token": d * (d + 1)}
    plain = found["tmsa"].trained - depth * of_condition["tmsa"]
    assert {kind: each.trained - plain for kind, each in found.items()} == {
        kind: depth * more for kind, more in of_condition.items()
    }
    macs = {"tmsa": 3 * d * d, "mlp": 4 * d * d, "token": d * d + 3 * d * d + 2 * n * d}  # its own, q k v, attention
    without = found["tmsa"].macs - depth * macs["tmsa"]
    assert {kind: each.macs - without for kind, each in found.items()} == {
        kind: depth * more for kind, more in macs.items()
    }


@pytest.mark.parametrize("condition", KINDS)
def test_a_recipe_chooses_it_and_the_default_is_left_out_of_the_identity(condition: ConditionKind) -> None:
    latents = DataSpec(channels=4, side=8, num_classes=3, learn_variance=True)
    images = DataSpec(channels=3, side=32, num_classes=0, learn_variance=False)
    for choice, data in (
        (DiffiTChoice(condition=condition), latents),
        (DiffiTImageChoice(condition=condition), images),
    ):
        config = choice.config(data)
        assert config.model_dump()["condition"] == condition
        for values in (choice.identity(), config.identity(), config.stable_values()):
            assert ("condition" in values) is (condition != "tmsa")
    with pytest.raises(ValidationError, match="condition"):
        DiffiTChoice(condition="adaln")  # type: ignore[arg-type]
