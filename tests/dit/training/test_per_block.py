"""Blocks that are compiled or gone through twice compute what they computed before."""

import pytest
import torch
from torch import Tensor, nn

from dit.models.build import build
from dit.models.config import DiffiTImageConfig, DiTConfig, ModelConfig
from dit.models.diffit_image import ResBlock
from dit.training.per_block import blocks, compile_blocks, recompute_blocks

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
