"""The four ways to condition a block."""

from typing import get_args

import published_costs
import pytest
import torch
from pydantic import ValidationError
from random_dit import randomise
from torch import Tensor
from torch.nn import functional as F

from dit.models.blocks import BLOCKS
from dit.models.build import build
from dit.models.config import BlockKind, DiTConfig, dit_config
from dit.models.cost import cost
from dit.models.dit import DiT
from dit.models.layers import CrossAttention
from storage.errors import InputError

KINDS = list(get_args(BlockKind))


def tiny(block: BlockKind, **fields: object) -> DiT:
    torch.manual_seed(0)
    config = {"input_size": 8, "width": 48, "depth": 2, "heads": 3, "num_classes": 10, "block": block}
    model = build(DiTConfig.model_validate(config | fields))
    assert isinstance(model, DiT)
    return model


def randomised(block: BlockKind, **fields: object) -> DiT:
    model = tiny(block, **fields)
    randomise(model)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([0, 500, 999]), torch.tensor([0, 5, 10])


@pytest.mark.parametrize("block", KINDS)
def test_size_and_cost_are_the_published_ones(block: BlockKind) -> None:
    params, gmac = published_costs.BLOCKS[block]
    found = cost(dit_config("XL/2", block=block))
    assert round(found.parameters / 1e6, 1) == params
    assert found.macs / 1e9 == pytest.approx(gmac, rel=1e-3)


def test_the_table_is_the_choice_of_the_config() -> None:
    assert list(BLOCKS) == KINDS
    with pytest.raises(ValidationError, match="in_context"):
        DiTConfig.model_validate({"block": "film"})


@pytest.mark.parametrize("block", KINDS)
def test_untrained_model_predicts_zero_from_any_label(block: BlockKind) -> None:
    assert not tiny(block)(*batch()).any()


def test_untrained_adaln_block_is_a_plain_transformer_block() -> None:
    plain, adaln = tiny("in_context").blocks[0], tiny("adaln").blocks[0]
    adaln.load_state_dict({n: w for n, w in plain.state_dict().items() if "norm" not in n}, strict=False)
    tokens = torch.randn(2, 16, 48)
    torch.testing.assert_close(adaln(tokens, torch.randn(2, 48)), plain(tokens, torch.randn(2, 2, 48)))


@pytest.mark.parametrize("block", KINDS)
def test_time_and_label_reach_every_place_and_every_parameter_learns(block: BlockKind) -> None:
    model = randomised(block)
    x, t, y = batch()
    out = model(x, t, y)
    assert out.shape == (3, 8, 8, 8)
    assert ((model(x, t + 1, y) - out).abs() > 0).float().mean() > 0.99
    assert ((model(x, t, y - y + 3) - out).abs() > 0).float().mean() > 0.99
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("block", KINDS)
def test_unconditional_model(block: BlockKind) -> None:
    model = randomised(block, num_classes=0)
    x, t, y = batch()
    out = model(x, t, None)
    assert out.shape == (3, 8, 8, 8)
    assert not torch.allclose(model(x, t + 100, None), out)
    with pytest.raises(InputError, match="unconditional"):
        model(x, t, y)


@pytest.mark.parametrize("block", KINDS)
def test_compiles_into_one_graph(block: BlockKind) -> None:
    model = randomised(block)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch()), model(*batch()))


@pytest.mark.parametrize("block", KINDS)
def test_meta_model_can_be_initialised_where_it_lands(block: BlockKind) -> None:
    with torch.device("meta"):
        landed = build(tiny(block).config)
    assert isinstance(landed, DiT)
    landed.to_empty(device="cpu")
    torch.manual_seed(0)
    landed.init_weights()
    again = tiny(block)
    torch.manual_seed(0)
    again.init_weights()
    for name, weight in again.state_dict().items():
        assert torch.equal(landed.state_dict()[name], weight), name


def test_cross_attention_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = CrossAttention(48, 3), torch.nn.MultiheadAttention(48, 3, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.kv.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([ours.q.bias, ours.kv.bias]).detach()
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, c = torch.randn(2, 16, 48), torch.randn(2, 2, 48)
    torch.testing.assert_close(ours(x, c), theirs(x, c, c)[0])


def test_in_context_block_is_torchs() -> None:
    """A pre-norm encoder layer, except for the approximation of GELU."""
    block = randomised("in_context").blocks[0]
    theirs = torch.nn.TransformerEncoderLayer(
        48, 3, 192, dropout=0, activation=lambda x: F.gelu(x, approximate="tanh"), layer_norm_eps=1e-6,
        batch_first=True, norm_first=True,
    )  # fmt: skip
    ours = block.state_dict()
    weights = {f"self_attn.in_proj_{kind}": ours[f"attn.qkv.{kind}"] for kind in ("weight", "bias")}
    names = {"self_attn.out_proj": "attn.proj", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    names |= {"norm1": "norm1", "norm2": "norm2"}
    weights |= {f"{a}.{kind}": ours[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    theirs.load_state_dict(weights)
    x = torch.randn(2, 18, 48)
    torch.testing.assert_close(block(x, x), theirs(x), rtol=1e-5, atol=1e-5)
