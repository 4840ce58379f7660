"""The benchmark of a training step, at a size that a test can afford."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import train_step
from benchmarks.peer import diffusers_dit
from benchmarks.train_step import BACKBONE_RATIOS, BACKBONES, CONTESTANTS, OPTIONS, RATIOS, Task, check_losses, contest
from dit.diffusion.config import FlowConfig
from dit.models.config import DiTConfig
from dit.models.cost import cost
from dit.training.throughput import matmul_speed

TASK = Task(DiTConfig(input_size=8, width=32, depth=2, heads=2, num_classes=4), batch_size=2, rounds=2)


FLOW = replace(TASK, config=TASK.config.model_copy(update={"learn_variance": False}), diffusion=FlowConfig())


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for bfloat16 takes minutes for large ones."""
    monkeypatch.setattr(train_step, "matmul_speed", partial(matmul_speed, side=64))


@pytest.mark.parametrize("task", [TASK, FLOW])
def test_contest_in_small(task: Task) -> None:
    with torch.compiler.set_stance("force_eager"):
        results, ratios = contest(task)
    values = {result.name: result.value for result in results}
    assert all(math.isfinite(value) and value > 0 for value in values.values())
    assert ratios.keys() == RATIOS.keys()
    assert ratios["vs_fp32"] == pytest.approx(values["ours_bf16_speed"] / values["plain_fp32_speed"])
    for name in CONTESTANTS:
        assert values[f"{name}_speed"] == pytest.approx(2 / values[f"{name}_best"])
    flops = values["ours_bf16_speed"] * cost(task.config).training_flops
    assert values["ours_bf16_mfu"] == pytest.approx(100 * flops / (1e12 * values["matmul_bf16"]))


def test_options_in_small() -> None:
    with torch.compiler.set_stance("force_eager"):
        results, ratios = contest(TASK, BACKBONES[torch.float32], BACKBONE_RATIOS)
    values = {result.name: result.value for result in results}
    assert ratios.keys() == BACKBONE_RATIOS.keys()
    assert ratios["rope_vs_dit"] == pytest.approx(values["rope_speed"] / values["dit_speed"])
    assert ratios["lightning_eager_vs_dit"] == pytest.approx(
        values["lightning_eager_speed"] / values["dit_eager_speed"]
    )
    assert values["dit_loss"] == pytest.approx(values["plain_loss"], rel=1e-5)
    assert all(abs(values[f"{name}_loss"] - values["dit_loss"]) > 1e-4 for name in OPTIONS)  # they are other networks
    assert values["lightning_loss"] == pytest.approx(values["lightning_eager_loss"], rel=1e-5)


def test_memory_holds_weights_gradients_moments_and_average_at_least() -> None:
    model, batch = train_step._model(TASK.config), train_step._batch(TASK)
    contestant = train_step.ours(model, batch, torch.float32, TASK.process, compiled=False)
    contestant.step()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert contestant.held() == pytest.approx(4 * weights, rel=0.05)
    assert 4.9 * weights < train_step.peak_memory(contestant) < 30 * weights


def test_contestants_train() -> None:
    model, batch = train_step._model(TASK.config), train_step._batch(TASK)
    for _, (dtype, make) in CONTESTANTS.items():
        with torch.compiler.set_stance("force_eager"):
            contestant = make(model, batch, dtype, TASK.process)
            losses = [contestant.step().item() for _ in range(3)]
        assert losses[2] < losses[1] < losses[0]
        moved = (contestant.averages[-1] - list(contestant.model.parameters())[-1]).abs().max()
        assert 0 < moved < 1e-2


@pytest.mark.parametrize(("name", "factor"), [("ours_fp32", 1 + 3e-5), ("ours_bf16", 0.99), ("ours_fp32", math.nan)])
def test_another_loss_is_refused(name: str, factor: float) -> None:
    losses = dict.fromkeys(CONTESTANTS, 1.5)
    check_losses(losses)
    with pytest.raises(ValueError, match=name):
        check_losses(losses | {name: 1.5 * factor})


def test_a_peer_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "diffusers_dit", partial(diffusers_dit, norm_eps=0.1))
    with torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match="first loss"):
        contest(TASK)
