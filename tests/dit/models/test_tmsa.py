"""Attention that the time shifts, and the transformer made of it."""

from pathlib import Path

import published_costs
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from random_dit import randomise
from safetensors.torch import save_file
from scipy import stats
from tiny import commit_model
from torch import Tensor

from dit.diffusion.config import DiffusionConfig
from dit.export import EMA_WEIGHTS, ModelCard, load
from dit.models.build import AnyModelConfig, build
from dit.models.config import DiffiTConfig, DiTConfig, ModelConfig, diffit_config
from dit.models.cost import cost
from dit.models.diffit_latent import LatentDiffiT
from dit.models.tmsa import TMSA, RelativeBias, TMSABlock
from storage.errors import InputError
from storage.latents import VaeInfo

TINY = {"input_size": 8, "width": 48, "depth": 2, "heads": 3, "num_classes": 10}


def tiny(**fields: object) -> LatentDiffiT:
    torch.manual_seed(0)
    model = build(DiffiTConfig.model_validate(TINY | fields))
    assert isinstance(model, LatentDiffiT)
    return model


def randomised(**fields: object) -> LatentDiffiT:
    model = tiny(**fields)
    randomise(model)
    return model


def batch(size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, size, size, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([0, 500, 999]), torch.tensor([0, 5, 10])


def attention(window: int = 3) -> TMSA:
    layer = TMSA(width=24, heads=4, time_width=10, window=window)
    randomise(layer)
    return layer


@pytest.mark.parametrize("window", [1, 2, 5])
def test_bias_of_two_places_is_the_table_at_their_distance(window: int) -> None:
    layer = RelativeBias(window, heads=3)
    side = 2 * window - 1
    torch.nn.init.normal_(layer.table)
    bias = layer()
    for query in range(window**2):
        for key in range(window**2):
            dy, dx = query // window - key // window, query % window - key % window
            row = layer.table[(dy + window - 1) * side + dx + window - 1]
            assert torch.equal(bias[:, query, key], row)


def test_attention_is_the_formula() -> None:
    layer, x, c = attention(), torch.randn(2, 9, 24), torch.randn(2, 10)
    q, k, v = (layer.qkv(x) + layer.time_qkv(c)[:, None]).chunk(3, dim=2)
    heads = []
    for h in range(4):
        part = slice(6 * h, 6 * h + 6)
        scores = q[:, :, part] @ k[:, :, part].transpose(1, 2) / 6**0.5 + layer.bias()[h]
        heads.append(scores.softmax(2) @ v[:, :, part])
    torch.testing.assert_close(layer(x, c), layer.proj(torch.cat(heads, 2)))


def test_time_of_the_keys_cancels_and_that_of_queries_and_values_does_not() -> None:
    x, c = torch.randn(2, 9, 24), torch.randn(2, 10)
    expected = attention()(x, c)
    for part, cancels in ((0, False), (1, True), (2, False)):
        layer = attention()
        layer.time_qkv.weight.data[24 * part : 24 * part + 24] = 0
        layer.time_qkv.bias.data[24 * part : 24 * part + 24] = 0
        assert torch.allclose(layer(x, c), expected, rtol=1e-4, atol=1e-5) is cancels


def test_each_window_sees_the_time_of_its_own_image() -> None:
    layer, x, c = attention(), torch.randn(6, 9, 24), torch.randn(2, 10)
    found = layer(x, c)
    for window in range(6):
        torch.testing.assert_close(found[window], layer(x[window : window + 1], c[window // 3 : window // 3 + 1])[0])


def test_initial_weights() -> None:
    model = tiny(width=192, heads=6, input_size=32, num_classes=1000)
    weights = model.state_dict()
    for name, fan in {"attn.qkv": 4 * 192, "attn.time_qkv": 4 * 192, "attn.proj": 2 * 192, "mlp.fc1": 5 * 192}.items():
        w, bound = weights[f"blocks.0.{name}.weight"], (6 / fan) ** 0.5
        assert 0.99 * bound < w.abs().max() <= bound
        assert not weights[f"blocks.0.{name}.bias"].any()
    table = weights["blocks.1.attn.bias.table"]
    assert table.shape == (31**2, 6)
    assert table.std() == pytest.approx(0.02, rel=0.03)
    assert stats.kstest(table.flatten() / 0.02, "norm").pvalue > 0.001  # not cut off
    assert weights["y_embedder.embedding_table.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert not weights["final_layer.linear.weight"].any()


@pytest.mark.parametrize(("name", "side"), published_costs.DIFFIT)
def test_size_and_cost(name: str, side: int) -> None:
    params, gmac = published_costs.DIFFIT[name, side]
    found = cost(diffit_config(name, input_size=side))
    assert round(found.trained / 1e6, 1) == params
    assert (name, side) != ("XL/2", 32) or found.trained == 561_035_232
    assert found.macs / 1e9 == pytest.approx(gmac, rel=1e-3)


def test_model_is_its_blocks() -> None:
    model = randomised()
    x, t, y = batch()
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t, x.dtype) + model.y_embedder(y)
    for block in model.blocks:
        assert isinstance(block, TMSABlock)
        tokens = tokens + block.attn(torch.nn.functional.layer_norm(tokens, (48,), eps=1e-6), c)
        tokens = tokens + block.mlp(torch.nn.functional.layer_norm(tokens, (48,), eps=1e-6))
    patches = model.final_layer.linear(torch.nn.functional.silu(model.final_layer.norm_final(tokens)))
    folded = torch.nn.functional.fold(
        patches.unflatten(2, (4, 8)).transpose(2, 3).flatten(2).transpose(1, 2), (8, 8), 2, stride=2
    )
    torch.testing.assert_close(model(x, t, y), folded)


def test_untrained_model_predicts_zero() -> None:
    assert not tiny()(*batch()).any()


def test_every_parameter_but_the_position_table_learns() -> None:
    model = randomised()
    model(*batch()).square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert "pos_embed" not in trained
    assert all(grad is not None and grad.abs().sum() > 0 for grad in trained.values())


def test_compiles_into_one_graph() -> None:
    model = randomised()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, found = model(*batch()), compiled(*batch())
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(out.square().sum(), model.blocks[0].attn.bias.table)[0] for out in (expected, found)]
    torch.testing.assert_close(grads[1], grads[0])


def test_runs_in_bfloat16() -> None:
    model = randomised()
    x, t, y = batch()
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, y)
    low = model.bfloat16()(x.bfloat16(), t, y)
    for out in (mixed, low):
        assert (out.float() - exact).norm() < 0.03 * exact.norm()


def test_unconditional_model_takes_no_labels() -> None:
    model = randomised(num_classes=0)
    x, t, y = batch()
    assert model(x, t, None).shape == (3, 8, 8, 8)
    with pytest.raises(InputError, match="unconditional"):
        model(x, t, y)
    with pytest.raises(InputError, match="null label is 10"):
        tiny()(x, t, None)


def test_config_knows_its_kind() -> None:
    read = TypeAdapter[ModelConfig](AnyModelConfig).validate_python
    assert read({"kind": "diffit"} | TINY) == DiffiTConfig.model_validate(TINY)
    assert read({"kind": "dit"} | TINY) == DiTConfig.model_validate(TINY)
    with pytest.raises(ValidationError, match="block"):
        read({"kind": "diffit", "block": "adaln"})
    with pytest.raises(InputError, match="S, B, L, XL"):
        diffit_config("H/2")


def test_files_alone_make_the_model(tmp_path: Path) -> None:
    model = randomised()
    vae = VaeInfo(source="vae", sha256="0" * 64, scaling_factor=1.0, downsample=4, channels=4)
    card = ModelCard(
        model=model.config, diffusion=DiffusionConfig(), vae=vae, resolution=32, class_names=("a",) * 10, steps=1
    )
    save_file(model.state_dict(), tmp_path / EMA_WEIGHTS)
    commit_model(tmp_path, card)
    loaded = load(str(tmp_path))
    assert loaded.card == card
    assert torch.equal(loaded.model(*batch()), model(*batch()))
