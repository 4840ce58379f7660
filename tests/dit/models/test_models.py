import numpy as np
import published_costs
import pytest
import torch
from pydantic import ValidationError
from random_dit import randomise

from dit.models.build import build
from dit.models.config import DiTConfig, dit_config
from dit.models.cost import cost
from dit.models.dit import DiT
from dit.models.layers import grid_sinusoid
from storage.errors import InputError

TINY = DiTConfig(input_size=8, width=48, depth=2, heads=3, num_classes=10)


def tiny(**fields: object) -> DiT:
    torch.manual_seed(0)
    model = build(DiTConfig.model_validate(TINY.model_dump() | fields))
    assert isinstance(model, DiT)
    return model


def batch(b: int = 3, size: int = 8, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(b, channels, size, size, generator=generator)
    return x, torch.tensor([0, 500, 999] * b)[:b], torch.tensor([0, 5, 10] * b)[:b]


@pytest.mark.parametrize("name", published_costs.DIT)
def test_size_and_cost_are_the_published_ones(name: str) -> None:
    params, gmac, _ = published_costs.DIT[name]
    found = cost(dit_config(name))
    assert found.parameters / 1e6 == pytest.approx(params, rel=1e-3)
    assert found.macs / 1e9 == pytest.approx(gmac, rel=5e-3, abs=published_costs.rounding(gmac))


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the public XL/2 checkpoint for 256 pixels."""
    d = 1152
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 256, d), "y_embedder.embedding_table.weight": (1001, d)}
    linears = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d), "final_layer.linear": (32, d)}
    linears |= {"x_embedder.proj": (d, 4, 2, 2), "final_layer.adaLN_modulation.1": (2 * d, d)}
    for i in range(28):
        linears[f"blocks.{i}.attn.qkv"], linears[f"blocks.{i}.attn.proj"] = (3 * d, d), (d, d)
        linears[f"blocks.{i}.mlp.fc1"], linears[f"blocks.{i}.mlp.fc2"] = (4 * d, d), (d, 4 * d)
        linears[f"blocks.{i}.adaLN_modulation.1"] = (6 * d, d)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def test_state_dict_is_the_published_one() -> None:
    with torch.device("meta"):
        found = {name: tuple(t.shape) for name, t in build(dit_config("XL/2")).state_dict().items()}
        larger = build(dit_config("XL/2", input_size=64)).state_dict()
    assert len(found) == 292
    assert found == published_shapes()
    changed = {name for name, t in larger.items() if tuple(t.shape) != found[name]}
    assert changed == {"pos_embed"}


def test_initial_weights() -> None:
    model = tiny(width=384, heads=6, num_classes=1000)
    weights = model.state_dict()
    d = 384
    for name, fan in {
        "blocks.0.attn.qkv": d + 3 * d,
        "blocks.1.attn.proj": d + d,
        "blocks.0.mlp.fc1": d + 4 * d,
        "blocks.1.mlp.fc2": d + 4 * d,
        "x_embedder.proj": 16 + d,
    }.items():
        bound = (6 / fan) ** 0.5
        w = weights[f"{name}.weight"]
        assert w.abs().max() <= bound
        assert w.abs().max() > 0.99 * bound
        assert w.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        w = weights[f"{name}.weight"]
        assert w.std() == pytest.approx(0.02, rel=0.02)
        assert w.abs().max() > 0.06  # normal, not uniform
    zero = [n for n in weights if n.endswith("bias") or "adaLN" in n or n.startswith("final_layer.linear")]
    assert len(zero) == 19
    assert all(not weights[name].any() for name in zero)


def test_untrained_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    model = tiny()
    assert not model(*batch()).any()
    tokens, c = torch.randn(2, 16, 48), torch.randn(2, 48)
    for block in model.blocks:
        torch.testing.assert_close(block(tokens, c), tokens, rtol=0, atol=0)


def test_every_parameter_but_the_position_table_learns() -> None:
    model = tiny()
    randomise(model)
    model(*batch()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_position_table_puts_the_column_first_and_sines_before_cosines() -> None:
    width, side = 16, 5
    table = grid_sinusoid(width, side)[0].numpy()
    for token in range(side * side):
        row, column = divmod(token, side)
        angles = [place / 10000 ** (i / 4) for place in (column, row) for i in range(4)]
        expected = [*np.sin(angles[:4]), *np.cos(angles[:4]), *np.sin(angles[4:]), *np.cos(angles[4:])]
        np.testing.assert_allclose(table[token], expected, atol=1e-7)


def test_one_patch_of_the_input_reaches_its_own_place_first() -> None:
    """With closed attention the network acts on each patch alone, so a patch must come out where it went in."""
    model = tiny()
    randomise(model)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    x, t, y = batch()
    moved = x.clone()
    moved[:, :, 2:4, 6:8] += 1
    changed = (model(moved, t, y) - model(x, t, y)).abs().amax(dim=(0, 1)) > 1e-6
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(changed, expected)


def test_meta_model_can_be_initialised_where_it_lands() -> None:
    with torch.device("meta"):
        model = build(TINY)
    assert isinstance(model, DiT)
    model.to_empty(device="cpu")
    model.init_weights()
    assert torch.equal(model.pos_embed, grid_sinusoid(48, 4))
    assert not model(*batch()).any()


def test_compiles_into_one_graph() -> None:
    model = tiny()
    randomise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch()), model(*batch()))


def test_runs_in_bfloat16() -> None:
    model = tiny()
    randomise(model)
    x, t, y = batch()
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, y)
    low = model.bfloat16()(x.bfloat16(), t, y)
    assert low.dtype == torch.bfloat16
    for out in (mixed, low):
        assert (out.float() - exact).norm() < 0.03 * exact.norm()


def test_unconditional_model() -> None:
    model = tiny(num_classes=0)
    x, t, y = batch()
    assert not any(name.startswith("y_embedder") for name in model.state_dict())
    assert model(x, t, None).shape == (3, 8, 8, 8)
    with pytest.raises(InputError, match="unconditional"):
        model(x, t, y)


def test_conditional_model_wants_labels() -> None:
    x, t, _ = batch()
    with pytest.raises(InputError, match="null label is 10"):
        tiny()(x, t, None)


def test_fixed_variance_halves_the_output() -> None:
    assert tiny(learn_variance=False)(*batch()).shape == (3, 4, 8, 8)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"input_size": 9}, "patch_size"),
        ({"heads": 5}, "heads"),
        ({"width": 6, "heads": 3}, "multiple of 4"),
        ({"num_classes": -1}, "num_classes"),
        ({"depht": 3}, "depht"),
    ],
)
def test_config_refuses_what_does_not_fit(fields: dict[str, int], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        DiTConfig.model_validate(TINY.model_dump() | fields)


@pytest.mark.parametrize("name", ["M/2", "XL", "XL/x", ""])
def test_unknown_size(name: str) -> None:
    with pytest.raises(InputError, match="S, B, L, XL"):
        dit_config(name)


def test_size_is_a_row_and_other_fields_are_given() -> None:
    config = dit_config("B/4", num_classes=10, input_size=64)
    assert (config.depth, config.width, config.heads, config.patch_size) == (12, 768, 12, 4)
    assert (config.num_classes, config.input_size, config.in_channels) == (10, 64, 4)
