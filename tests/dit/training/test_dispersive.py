"""The dispersive loss: its gradient, and that it is the same on any ranks and in any micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forked import Faults, Job, Template
from torch import Tensor, nn

from dit import train
from dit.diffusion.config import DiffusionConfig
from dit.diffusion.gaussian import GaussianDiffusion
from dit.export import CheckpointManifest
from dit.models.build import build
from dit.models.config import DiTConfig, diffit_image_config
from dit.ranks import Ranks
from dit.training.config import TrainConfig
from dit.training.data import Batch
from dit.training.dispersive import Dispersive
from dit.training.ema import EMA
from dit.training.loop import StepConfig, TrainState
from dit.training.per_block import compile_blocks, recompute_blocks
from storage.errors import InputError
from storage.latents import LatentManifest

MODEL = DiTConfig(input_size=8, width=32, depth=3, heads=2, num_classes=4)
TERM = Dispersive(block=2, weight=30.0, tau=0.7)
PROCESS = GaussianDiffusion.from_config(DiffusionConfig())
ROWS = 5


def naive(z: Tensor, tau: float) -> Tensor:
    """The logarithm of the mean over all pairs."""
    rows = [torch.stack([torch.exp(-(a - b).square().mean() / tau) for b in z]) for a in z]
    return torch.stack(rows).mean().log()


@pytest.mark.parametrize("sizes", [[5], [2, 2, 1]])
def test_pulls_are_the_gradient_of_the_weighted_term(sizes: list[int]) -> None:
    z = (100 + torch.randn(5, 3, 4)).requires_grad_()
    found = TERM.pulls(z.split(sizes), Ranks())
    value = naive(z.double(), TERM.tau)
    (expected,) = torch.autograd.grad(TERM.weight * value, z)
    assert found.term == pytest.approx(value.item(), rel=1e-5)
    assert [len(part) for part in found.of_parts] == sizes
    torch.testing.assert_close(torch.cat(found.of_parts), expected, rtol=1e-4, atol=1e-6)


def test_equal_outputs_are_not_pulled() -> None:
    found = TERM.pulls([torch.ones(4, 2, 3)], Ranks())
    assert found.term == 0
    assert not found.of_parts[0].any()


def drawn() -> nn.Module:
    torch.manual_seed(0)
    model = build(MODEL)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x0, noise = (torch.randn(ROWS, 4, 8, 8, generator=generator) for _ in range(2))
    return Batch(x0, noise, torch.rand(ROWS, generator=generator, dtype=torch.float64), torch.arange(ROWS))


def stepped(model: nn.Module, **fields: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The terms of a step of plain gradient descent, and the weights after it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = TrainState(model, {"ema": EMA(model, 0.9)}, torch.optim.SGD(trained, lr=1.0, fused=True))
    how = StepConfig(learning_rate=lambda _: 0.1, **fields)
    (result,) = train.train(state, PROCESS, batch, how, stop=1, ranks=Ranks())
    return {name: term.item() for name, term in result.terms.items()}, dict(model.state_dict())


def by_hand() -> tuple[float, float, dict[str, Tensor]]:
    """Loss, term and weights after a step in which autograd sees the whole batch."""
    model, given, kept = drawn(), batch(), []
    model.blocks[1].register_forward_hook(lambda _module, _given, out: kept.append(out))
    loss = PROCESS.training_terms(model, given.x0, given.noise, PROCESS.sample_t(given.u), given.y)["loss"].mean()
    term = naive(kept[0], TERM.tau)
    (loss + TERM.weight * term).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return loss.item(), term.item(), dict(model.state_dict())


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 5])
def test_a_step_is_that_of_the_whole_batch(micro_batch: int | None) -> None:
    loss, term, weights = by_hand()
    terms, found = stepped(drawn(), dispersive=TERM, micro_batch=micro_batch)
    assert terms["loss"] == pytest.approx(loss, rel=1e-5)
    assert terms["dispersive"] == pytest.approx(term, rel=1e-4)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-6)
    _, without = stepped(drawn())
    assert (without["blocks.0.mlp.fc1.weight"] - weights["blocks.0.mlp.fc1.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_blocks_may_be_compiled_and_gone_through_twice(
    micro_batch: int | None, made: list[torch.fx.GraphModule]
) -> None:
    model = drawn()
    compile_blocks(model)
    recompute_blocks(model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        terms, weights = stepped(model, dispersive=TERM, micro_batch=micro_batch)
    assert len(made) == (1 if micro_batch is None else 2)  # one for each size of micro-batch
    expected, others = stepped(drawn(), dispersive=TERM, micro_batch=micro_batch)
    assert terms == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-6)


def training(**fields: Any) -> TrainConfig:
    model = tiny.MODEL.model_copy(update={"size": tiny.MODEL.size.model_copy(update={"depth": 2})})
    term = {"model": model, "dispersive": Dispersive(block=1, weight=0.5), "steps": 6, "checkpoint_every": 2}
    return tiny.TRAINING.model_copy(update=term | fields)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"micro_batch": 3}, marks=pytest.mark.full),
        {"parallel": "fsdp", "micro_batch": 3, "checkpoint_activations": True},
    ],
)
def test_ranks_end_in_the_same_bits_after_a_kill_and_near_one_rank(
    tmp_path: Path, template: Template, store: LatentManifest, fields: dict[str, Any]
) -> None:
    """Also sharded, in micro-batches of two sizes, with blocks gone through twice."""
    config, found = training(**fields), []
    for name, faults in {"calm": Faults(), "killed": Faults(kills=[(1, 5)], restarts=1)}.items():
        out = tiny.output(tmp_path / name, CheckpointManifest, config, latents=store)
        template.finish(Job(out, config, store, ranks=2, faults=faults))
        found.append(CheckpointManifest.read(out.uri))
    assert tiny.objects(found[0]) == tiny.objects(found[1])
    alone = tiny.run_train(tmp_path / "alone", training(), store)
    assert alone.digest == found[0].digest
    assert alone.metrics == pytest.approx(found[0].metrics, rel=1e-4)


def test_it_pushes_outputs_apart(tmp_path: Path, store: LatentManifest) -> None:
    term = Dispersive(block=1, weight=2.0)
    found, with_next_to_none = (
        tiny.run_train(tmp_path / str(weight), training(dispersive=term.model_copy(update={"weight": weight})), store)
        for weight in (2.0, 1e-9)
    )
    assert found.digest != with_next_to_none.digest
    assert found.metrics["final_dispersive"] < with_next_to_none.metrics["final_dispersive"] - 0.01


def test_a_block_that_the_model_has_not_is_refused(tmp_path: Path, store: LatentManifest) -> None:
    with pytest.raises(InputError, match=r"train.dispersive.block: 3 is beyond the 2 blocks of the model$"):
        tiny.run_train(tmp_path, training(dispersive=Dispersive(block=3)), store)


def test_memory_is_that_of_all_outputs() -> None:
    assert Dispersive(block=3).memory(MODEL, 10) == 3 * 4 * 10 * 16 * 32
    assert Dispersive(block=1).output(diffit_image_config("digits16")).numel() == 32 * 16 * 16
