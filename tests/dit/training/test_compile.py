"""Blocks compiled to machine code compute what they compute without, forward and backward."""

import os
import shutil
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from dit.models.build import build
from dit.models.config import BlockKind, DiffiTConfig, DiffiTImageConfig, DiTConfig, ModelConfig
from dit.training.per_block import blocks, compile_blocks

SMALL = {"input_size": 16, "width": 64, "depth": 1, "heads": 2, "num_classes": 4}
LIGHTNING = {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True}
KINDS = get_args(BlockKind)
IMAGE = DiffiTImageConfig(input_size=8, stem_width=32, widths=(32,), depths=(1,), window=8, time_width=32, dropout=0.5)
CONFIGS: dict[str, ModelConfig] = {
    **{kind: DiTConfig.model_validate(SMALL | {"block": kind}) for kind in KINDS},
    "lightning": DiTConfig.model_validate(SMALL | LIGHTNING),
    "diffit": DiffiTConfig.model_validate(SMALL),
    "diffit_image": IMAGE,
    **{f"diffit {kind}": DiffiTConfig.model_validate(SMALL | {"condition": kind}) for kind in ("mlp", "token")},
}
QUICK = "adaln_zero"
COMPILER = os.environ.get("CXX", "g++")
PRECISIONS = {"float32": 1e-5, "bfloat16": 0.05}
BATCH = 2


@pytest.fixture(scope="module", autouse=True)
def own_cache_of_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(compile_threads=1):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("code")))
        yield


def drawn(config: ModelConfig) -> nn.Module:
    """With no weight that starts at zero."""
    torch.manual_seed(0)
    model = build(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def run(model: nn.Module, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and all gradients."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, config.in_channels, config.input_size, config.input_size)
    keys = {"dropout": torch.arange(BATCH)} if config.kind == "diffit_image" else {}
    labels = torch.arange(BATCH) if config.num_classes else None
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(x, torch.arange(BATCH).float(), labels, **keys)
    out.float().square().mean().backward()
    return {"output": out} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_lie_in_order_in_memory(name: str) -> None:
    """The compiler's code for a transposed view under bfloat16 autocast gives NaN on processors with AMX."""
    model, seen = drawn(CONFIGS[name]), list[bool]()
    for block in blocks(model):
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    run(model, CONFIGS[name], torch.float32)
    assert seen == [True]


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"{COMPILER} is not installed, with which torch compiles")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.full) for name in CONFIGS]
)
def test_compiled_blocks_compute_what_they_compute_without(name: str, precision: str) -> None:
    config, dtype = CONFIGS[name], getattr(torch, precision)
    plain, compiled = drawn(config), drawn(config)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled)
    expected, found = run(plain, config, dtype), run(compiled, config, dtype)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert found.keys() == expected.keys()
    for each, tensor in found.items():
        gap = (tensor - expected[each]).float().norm() / expected[each].float().norm()
        assert gap < PRECISIONS[precision], each  # false for NaN
