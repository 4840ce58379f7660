"""Blocks that are compiled, gone through twice or attend in another way compute what they computed before."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.models.build import build
from dit.models.config import DiffiTImageConfig, DiTConfig, ModelConfig
from dit.models.diffit_image import ResBlock
from dit.models.layers import Attend, Attention, attend_by_products
from dit.training.per_block import blocks, choose_attention, compile_blocks, recompute_blocks

DIT = DiTConfig(input_size=8, width=32, depth=3, heads=2, num_classes=4)
LIGHTNING = DIT.model_copy(update={"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True})
IMAGE = DiffiTImageConfig(
    input_size=16, stem_width=32, widths=(32, 64), depths=(2, 1), window=4, time_width=32, dropout=0.5
)
MLP, TOKEN = (IMAGE.model_copy(update={"condition": kind}) for kind in ("mlp", "token"))
ONE_STAGE = IMAGE.model_copy(update={"widths": (32,), "depths": (2,)})


def drawn(config: ModelConfig) -> nn.Module:
    """With no weight that starts at zero."""
    torch.manual_seed(0)
    model = build(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def passed(model: nn.Module, config: ModelConfig, count: int = 3) -> tuple[list[Tensor], int]:
    """Output and gradients of a batch in autocast, and the bytes that were kept for the way back."""
    x = torch.randn(count, config.in_channels, config.input_size, config.input_size)
    keys = {"dropout": torch.arange(count)} if config.kind == "diffit_image" else {}
    sizes = list[int]()

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = torch.arange(count) if config.num_classes else None
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x, torch.arange(count).float(), y, **keys)
        out.square().mean().backward()
    return [out, *(p.grad for p in model.parameters() if p.grad is not None)], sum(sizes)


def test_blocks_of_every_model() -> None:
    dit, image = build(DIT), build(IMAGE)
    assert blocks(dit) == list(dit.blocks)
    assert [type(block) for block in blocks(image)] == [ResBlock] * 5


@pytest.mark.parametrize(
    "config", [DIT, LIGHTNING, IMAGE, MLP, TOKEN], ids=["dit", "lightning", "image", "mlp", "token"]
)
def test_going_through_blocks_twice_changes_no_bit_and_keeps_less(config: ModelConfig) -> None:
    plain, twice = drawn(config), drawn(config)
    recompute_blocks(twice)
    assert twice.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(1)
    expected, kept = passed(plain, config)
    torch.manual_seed(1)
    found, less = passed(twice, config)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert less < kept / 2


@pytest.mark.parametrize(
    ("config", "graphs"), [(DIT, 1), (LIGHTNING, 1), (ONE_STAGE, 2)], ids=["dit", "lightning", "image"]
)
def test_blocks_are_compiled_for_both_sizes_of_micro_batches(
    config: ModelConfig, graphs: int, made: list[torch.fx.GraphModule]
) -> None:
    """Equal ones once; none gives up, also where each block has its own graph since it drops other places."""
    plain, compiled = drawn(config), drawn(config)
    compile_blocks(compiled)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for count in (3, 2):
            torch.manual_seed(1)
            expected, _ = passed(plain, config, count)
            torch.manual_seed(1)
            found, _ = passed(compiled, config, count)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
    assert len(made) == 2 * graphs


def test_attention_by_products_is_as_exact_as_the_fused_kernel() -> None:
    torch.manual_seed(0)
    q, k, v, slope = (scale * torch.randn(2, 3, 256, 64, dtype=torch.float64) for scale in (2, 2, 1, 1))

    def gaps(attend: Attend) -> list[float]:
        """Relative errors of the output and of three gradients in bfloat16."""
        exact, low = (
            [part.bfloat16().to(dtype).requires_grad_() for part in (q, k, v)]
            for dtype in (torch.float64, torch.bfloat16)
        )
        out, expected = attend(*low), F.scaled_dot_product_attention(*exact)
        found = [out, *torch.autograd.grad(out, low, slope.bfloat16())]
        true = [expected, *torch.autograd.grad(expected, exact, slope.bfloat16().double())]
        return [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(found, true, strict=True)]

    ours, fused = gaps(attend_by_products), gaps(F.scaled_dot_product_attention)
    assert max(ours) < 3e-3
    assert max(ours[1:]) <= max(fused[1:])


@pytest.mark.parametrize("config", [DIT, LIGHTNING])
def test_attention_is_chosen_for_bfloat16_on_a_cpu(config: ModelConfig) -> None:
    model, ways = drawn(config), list[list[Attend]]()
    outputs = list[Tensor]()
    for autocast in (None, torch.bfloat16):
        choose_attention(model, autocast)
        ways.append([module.attend for module in model.modules() if isinstance(module, Attention)])
        torch.manual_seed(1)
        outputs.append(torch.cat([found.flatten() for found in passed(model, config)[0]]))
    assert ways == [[F.scaled_dot_product_attention] * 3, [attend_by_products] * 3]
    assert 0 < (outputs[0] - outputs[1]).norm() < 0.02 * outputs[0].norm()
