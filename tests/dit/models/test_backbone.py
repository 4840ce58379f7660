"""LightningDiT's options of the DiT, against closed forms, torch and NumPy."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from random_dit import randomise
from torch import Tensor, nn

from dit.models.build import build
from dit.models.choice import DataSpec, DiTChoice, Shape
from dit.models.config import BackboneOptions, BlockKind, DiTConfig, lightning_config
from dit.models.cost import cost
from dit.models.dit import DiT
from dit.models.layers import Attention, CrossAttention, RMSNorm, SwiGLU, grid_rotation, rotate

TINY: dict[str, Any] = {"input_size": 8, "width": 48, "depth": 2, "heads": 3, "num_classes": 10}
EACH: dict[str, dict[str, Any]] = {
    "norm": {"norm": "rms"}, "mlp": {"mlp": "swiglu"}, "rope": {"rope": True}, "qk_norm": {"qk_norm": True},
}  # fmt: skip
ALL: dict[str, Any] = {name: value for option in EACH.values() for name, value in option.items()}
BLOCKS: list[BlockKind] = list(get_args(BlockKind))


def fitting(block: BlockKind) -> dict[str, Any]:
    """All options that a block can have."""
    return ALL | {"block": block, "rope": block != "in_context"}


def randomised(**fields: Any) -> DiT:
    """With no weight that starts at zero or one."""
    model = build(DiTConfig.model_validate(TINY | fields))
    assert isinstance(model, DiT)
    randomise(model)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([0, 500, 999]), torch.tensor([0, 5, 10])


def test_rms_norm_is_torchs() -> None:
    ours, theirs = RMSNorm(48), nn.RMSNorm(48, eps=1e-6)
    ours.weight.data.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 48)
    x[0, 0] *= 1e-3  # where eps counts
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    given = x.double().numpy()
    expected = given / np.sqrt((given**2).mean(-1, keepdims=True) + 1e-6) * ours.weight.detach().numpy()
    np.testing.assert_allclose(ours(x).detach().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_rms_norm_is_computed_in_float32(autocast: bool) -> None:
    """The squares of these numbers are beyond float16, and sums of them beyond the digits of bfloat16."""
    norm = RMSNorm(512)
    for dtype in (torch.float16, torch.bfloat16):
        x = (300 + 10 * torch.randn(4, 512)).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = norm(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, nn.functional.rms_norm(x.float(), (512,), eps=1e-6).to(dtype))


def test_gated_mlp() -> None:
    torch.manual_seed(0)
    mlp, x = SwiGLU(6, 5), torch.randn(2, 3, 6, dtype=torch.float64)
    weights = {name: tensor.double().numpy() for name, tensor in mlp.state_dict().items()}
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        "w12.weight": (10, 6), "w12.bias": (10,), "w3.weight": (6, 5), "w3.bias": (6,)
    }  # fmt: skip
    both = x.numpy() @ weights["w12.weight"].T + weights["w12.bias"]
    a, b = both[..., :5], both[..., 5:]
    expected = (a / (1 + np.exp(-a)) * b) @ weights["w3.weight"].T + weights["w3.bias"]
    np.testing.assert_allclose(mlp.double()(x).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("width", "hidden"), [(1152, 3072), (384, 1024), (48, 128), (64, 170)])
def test_gated_mlp_has_two_thirds_of_the_units(width: int, hidden: int) -> None:
    assert hidden == int(2 / 3 * 4 * width)
    with torch.device("meta"):
        weights = build(DiTConfig(width=width, depth=1, heads=1, mlp="swiglu")).state_dict()
    assert weights["blocks.0.mlp.w12.weight"].shape == (2 * hidden, width)
    assert weights["blocks.0.mlp.w3.weight"].shape == (width, hidden)


def naively_rotated(x: np.ndarray[Any, Any], side: int) -> np.ndarray[Any, Any]:
    """RoPE of (B, h, N, d), one pair after the other."""
    out, d = x.copy(), x.shape[-1]
    for token in range(side * side):
        row, column = divmod(token, side)
        for pair in range(d // 2):
            place, i = (row, pair) if pair < d // 4 else (column, pair - d // 4)
            angle = place * 10000 ** (-2 * i / (d / 2))
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            out[..., token, 2 * pair : 2 * pair + 2] = x[..., token, 2 * pair : 2 * pair + 2] @ turn.T
    return out


@pytest.mark.parametrize(("width", "side"), [(16, 5), (4, 2), (72, 16)])
def test_rotation_is_a_naive_one(width: int, side: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, side * side, width))
    found = rotate(torch.from_numpy(x), grid_rotation(width, side, torch.device("cpu"))).numpy()
    assert found.dtype == x.dtype
    np.testing.assert_allclose(found, naively_rotated(x, side), atol=1e-5)


def test_logits_of_rotated_tokens_depend_on_where_they_are_to_each_other() -> None:
    side = 6
    q, k = (torch.randn(1, 1, 1, 16).expand(1, 1, side * side, 16) for _ in range(2))
    rotation = grid_rotation(16, side, torch.device("cpu"))
    logits = (rotate(q, rotation) @ rotate(k, rotation).mT).reshape(side, side, side, side)
    torch.testing.assert_close(logits[:-1, :-2, :-1, :-2], logits[1:, 2:, 1:, 2:], rtol=0, atol=1e-4)
    assert (logits[0, 0] - logits[0, 0, 0, 0]).abs().flatten()[1:].min() > 1e-3  # and all places differ


def test_rotation_in_bfloat16_is_computed_in_float32() -> None:
    x, rotation = torch.randn(1, 2, 256, 16).bfloat16(), grid_rotation(16, 16, torch.device("cpu"))
    assert torch.equal(rotate(x, rotation), rotate(x.float(), rotation).bfloat16())


def test_attention_norms_each_heads_queries_and_keys_before_it_rotates() -> None:
    torch.manual_seed(0)
    attention, x, rotation = (
        Attention(48, 3, qk_norm=True),
        torch.randn(2, 16, 48),
        grid_rotation(16, 4, torch.device("cpu")),
    )
    attention.q_norm.weight.data.normal_()
    attention.k_norm.weight.data.normal_()
    qkv = attention.qkv(x).reshape(2, 16, 3, 3, 16)
    q, k, v = (qkv[:, :, i].transpose(1, 2).detach().numpy() for i in range(3))
    normed = [
        each / np.sqrt((each**2).mean(-1, keepdims=True) + 1e-6) * norm.weight.detach().numpy()
        for each, norm in ((q, attention.q_norm), (k, attention.k_norm))
    ]
    q, k = (naively_rotated(each, 4) for each in normed)
    weights = np.exp(q @ k.swapaxes(-1, -2) / 4)
    weights /= weights.sum(-1, keepdims=True)
    expected = attention.proj(torch.from_numpy((weights @ v).swapaxes(1, 2).reshape(2, 16, 48)))
    torch.testing.assert_close(attention(x, rotation), expected)


def test_cross_attention_is_blind_to_the_length_of_normed_queries_and_keys() -> None:
    torch.manual_seed(0)
    x, c = torch.randn(2, 5, 48), torch.randn(2, 2, 48)
    for normed in (False, True):
        attention = CrossAttention(48, 3, qk_norm=normed)
        before = attention(x, c)
        for parameter in (attention.q.weight, attention.q.bias, attention.kv.weight[:48], attention.kv.bias[:48]):
            parameter.data *= 10
        assert torch.allclose(attention(x, c), before, atol=1e-4) == normed


def lightning_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of LightningDiT-XL/1 as published, without its buffers."""
    d, hidden = 1152, 3072
    linears: dict[str, tuple[int, ...]] = {"x_embedder.proj": (d, 32, 1, 1), "final_layer.linear": (32, d)}
    linears |= {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    linears |= {"final_layer.adaLN_modulation.1": (2 * d, d)}
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 256, d), "y_embedder.embedding_table.weight": (1001, d)}
    shapes["final_layer.norm_final.weight"] = (d,)
    for i in range(28):
        linears[f"blocks.{i}.attn.qkv"], linears[f"blocks.{i}.attn.proj"] = (3 * d, d), (d, d)
        linears[f"blocks.{i}.mlp.w12"], linears[f"blocks.{i}.mlp.w3"] = (2 * hidden, d), (d, hidden)
        linears[f"blocks.{i}.adaLN_modulation.1"] = (6 * d, d)
        shapes |= {f"blocks.{i}.norm1.weight": (d,), f"blocks.{i}.norm2.weight": (d,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def test_lightning_dit_is_the_published_one() -> None:
    config = lightning_config("XL/1")
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    assert found == lightning_shapes()
    counted = cost(config)
    assert (counted.trained, counted.parameters - counted.trained) == (674_961_824, 294_912)
    n, d = 256, 1152
    on_each_token = 32 * d + 28 * (3 * d * d + d * d + 3 * 3072 * d) + d * 32
    once = 256 * d + d * d + 28 * 6 * d * d + 2 * d * d
    assert counted.macs == n * on_each_token + once + 28 * 2 * n * n * d
    assert counted.macs / 1e9 == pytest.approx(118.6, rel=5e-3)  # as DiT-XL/2: a gated MLP costs as much as the plain


@pytest.mark.parametrize(("option", "extra"), [
    ("norm", 2 * (2 * 48) + 48),
    ("mlp", 2 * (3 * 128 * 48 + 2 * 128 + 48 - (8 * 48 * 48 + 5 * 48))),
    ("rope", 0),
    ("qk_norm", 2 * 2 * 16),
])  # fmt: skip
def test_parameters_of_each_option(option: str, extra: int) -> None:
    plain, found = (cost(DiTConfig.model_validate(TINY | fields)) for fields in ({}, EACH[option]))
    assert found.trained - plain.trained == extra
    assert found.macs == plain.macs


def test_defaults_are_the_dit() -> None:
    config = DiTConfig.model_validate(TINY)
    assert config.options == {}
    assert config.identity().keys() == config.model_dump().keys() - BackboneOptions.model_fields.keys()
    assert DiTConfig.model_validate(TINY | ALL).options == ALL
    assert DiTConfig.model_validate(TINY | {"rope": True}).identity()["rope"] is True


def test_choice_passes_the_options_on() -> None:
    choice = DiTChoice(size=Shape(width=48, depth=2, heads=3), patch_size=1, **ALL)
    data = DataSpec(channels=32, side=4, num_classes=3, learn_variance=False)
    found = choice.config(data)
    assert found.options == ALL
    assert (found.out_channels, found.tokens) == (32, 16)
    plain = DiTChoice(size=Shape(width=48, depth=2, heads=3))
    assert plain.identity().keys().isdisjoint(BackboneOptions.model_fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rope": True, "block": "in_context"}, "rope: the condition's tokens of an in_context block have no row"),
        ({"rope": True, "width": 36, "heads": 6}, "rope: heads of 6 channels are not a multiple of 4"),
        ({"norm": "batch"}, "norm"),
        ({"mlp": "relu"}, "mlp"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        DiTConfig.model_validate(TINY | fields)


@pytest.mark.parametrize("block", BLOCKS)
def test_untrained_model_predicts_zero_and_every_parameter_learns(block: BlockKind) -> None:
    model = build(DiTConfig.model_validate(TINY | fitting(block)))
    assert not model(*batch()).any()
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert norms
    assert all(bool((norm.weight == 1).all()) for norm in norms)
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    model = randomised(**fitting(block))
    out = model(*batch())
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("option", EACH)
def test_each_option_changes_what_is_computed(option: str) -> None:
    plain, other = randomised(), randomised(**EACH[option])
    other.load_state_dict(plain.state_dict(), strict=False)
    if option == "norm":
        for module in other.modules():
            if isinstance(module, RMSNorm):
                module.init_weights()
    assert not torch.allclose(plain(*batch()), other(*batch()), rtol=1e-3)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    weights = build(DiTConfig.model_validate(TINY | ALL | {"width": 384, "heads": 6})).state_dict()
    for name, fan in {"w12": 384 + 2048, "w3": 384 + 1024}.items():
        weight, bound = weights[f"blocks.1.mlp.{name}.weight"], (6 / fan) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert not weights[f"blocks.1.mlp.{name}.bias"].any()


@pytest.mark.parametrize("block", BLOCKS)
def test_meta_model_can_be_initialised_where_it_lands(block: BlockKind) -> None:
    config = DiTConfig.model_validate(TINY | fitting(block))
    with torch.device("meta"):
        landed = build(config)
    assert isinstance(landed, DiT)
    landed.to_empty(device="cpu")
    torch.manual_seed(0)
    landed.init_weights()
    torch.manual_seed(0)
    again = build(config)
    torch.manual_seed(0)
    again.init_weights()
    assert all(torch.equal(landed.state_dict()[name], weight) for name, weight in again.state_dict().items())


@pytest.mark.parametrize("block", BLOCKS)
def test_compiles_into_one_graph(block: BlockKind) -> None:
    model = randomised(**fitting(block))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch()), model(*batch()))


def test_runs_in_bfloat16() -> None:
    model = randomised(**ALL)
    x, t, y = batch()
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, y)
    low = model.bfloat16()(x.bfloat16(), t, y)
    assert low.dtype == torch.bfloat16
    for out in (mixed, low):
        assert (out.float() - exact).norm() < 0.03 * exact.norm()
