"""Runs that train adapters of another run's model."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from beginning import output, run, weights
from forked import Faults, Job, Template
from pydantic import ValidationError

from dit.export import CheckpointManifest, load
from dit.models.lora import Lora, merged
from dit.ranks import Ranks
from dit.training.checkpoint import load_newest
from dit.training.config import Init, TrainConfig
from dit.training.dispersive import Dispersive
from dit.training.loop import TrainState
from dit.training.start import initial_state
from storage.errors import InputError
from storage.latents import LatentManifest

LORA = Lora(rank=2, alpha=3.0, targets=("*blocks.*", "!*.mlp.fc1"))
LAYERS = {f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc2", "adaLN_modulation.1")}
TABLE = "y_embedder.embedding_table.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, store: LatentManifest) -> CheckpointManifest:
    """A trained model, whose EMA is not its raw weights."""
    config = tiny.TRAINING.model_copy(update={"steps": 4})
    return tiny.run_train(tmp_path_factory.mktemp("base"), config, store)


@pytest.fixture(scope="module")
def config(base: CheckpointManifest) -> TrainConfig:
    changes = {"seed": 3, "init": Init(source=base.uri), "lora": LORA, "freeze": ("!y_embedder.*",)}
    return tiny.TRAINING.model_copy(update=changes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, store: LatentManifest, config: TrainConfig) -> CheckpointManifest:
    return run(tmp_path_factory.mktemp("plain"), config, store)


def end(config: TrainConfig, manifest: CheckpointManifest, store: LatentManifest) -> TrainState:
    """The state after the last step, with adapters."""
    state = initial_state(config, manifest.card, Ranks())
    load_newest([output(Path(manifest.uri).parents[1], config, store)], state, Ranks())
    assert state.step == 12
    return state


def test_training_starts_at_the_given_weights(
    base: CheckpointManifest, config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        state = initial_state(config, base.card, Ranks())
    given = weights(base)
    for found in (state.model.state_dict(), state.averages["ema"].weights()):
        begun = merged(found, LORA)
        assert begun.keys() == given.keys()
        assert all(torch.equal(begun[name], tensor) for name, tensor in given.items())
    trained = {name for name, parameter in state.model.named_parameters() if parameter.requires_grad}
    adapters = {name.replace("weight", part) for name in LAYERS for part in ("lora_a", "lora_b")}
    assert trained == {TABLE, *adapters}
    sizes = {"attn.qkv": 32 + 96, "attn.proj": 64, "mlp.fc2": 128 + 32, "adaLN_modulation.1": 32 + 192}
    assert f"{2 * sum(sizes.values()) + 4 * 32:,} parameters are trained" in caplog.text


def test_the_model_has_the_sum_and_nothing_else_has_changed(
    base: CheckpointManifest, plain: CheckpointManifest, config: TrainConfig, store: LatentManifest
) -> None:
    state, given = end(config, plain, store), weights(base)
    parts = {"model.safetensors": state.averages["ema"].weights(), "model-raw.safetensors": state.model.state_dict()}
    for file, held in parts.items():
        found = weights(plain, file)
        assert {name for name in given if not torch.equal(found[name], given[name])} == {*LAYERS, TABLE}
        for name in LAYERS:
            a, b = (held[name.replace("weight", part)].numpy().astype(float) for part in ("lora_a", "lora_b"))
            change = 3 / 2 * b @ a
            np.testing.assert_allclose(found[name].numpy(), given[name].numpy() + change, rtol=0, atol=1e-6)
            assert np.linalg.matrix_rank(change) == 2
    optimizer = {name.split(".")[1] for name in index(plain) if name.startswith("optimizer.")}
    assert len(optimizer) == 2 * len(LAYERS) + 1


def index(manifest: CheckpointManifest) -> dict[str, Any]:
    """The tensors of the last checkpoint."""
    (record,) = Path(manifest.uri).glob("checkpoints/step-000000012/record.json")
    return dict(json.loads(record.read_bytes())["index"])


def test_the_model_computes_what_was_trained(
    plain: CheckpointManifest, config: TrainConfig, store: LatentManifest
) -> None:
    trained, found = end(config, plain, store).model, load(plain.uri, weights="model-raw.safetensors").model
    torch.manual_seed(0)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 300.0, 999.0]), torch.tensor([0, 1, 3])
    with torch.no_grad():
        torch.testing.assert_close(found(x, t, y), trained(x, t, y), rtol=0, atol=1e-6)


def test_the_card_says_so_and_the_model_is_one_to_start_from(
    base: CheckpointManifest, plain: CheckpointManifest, config: TrainConfig
) -> None:
    assert load(plain.uri).card.lora == plain.card.lora == LORA
    assert "lora" not in json.loads(base.read_object("model.json"))
    again = config.model_copy(update={"init": Init(source=plain.uri), "lora": None, "freeze": ()})
    state = initial_state(again, base.card, Ranks())
    assert all(torch.equal(state.model.state_dict()[name], tensor) for name, tensor in weights(plain).items())


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_run_has_the_same_bits(
    tmp_path: Path, store: LatentManifest, config: TrainConfig, plain: CheckpointManifest, step: int
) -> None:
    with pytest.raises(tiny.Killed):
        run(tmp_path, config, store, tiny.Killer(step))
    assert tiny.objects(run(tmp_path, config, store)) == tiny.objects(plain)


def test_recomputed_blocks_have_the_same_bits(
    tmp_path: Path, store: LatentManifest, config: TrainConfig, plain: CheckpointManifest
) -> None:
    recomputed = config.model_copy(update={"checkpoint_activations": True})
    assert tiny.objects(run(tmp_path, recomputed, store)) == tiny.objects(plain)


def test_compiled_blocks_end_near(
    tmp_path: Path,
    store: LatentManifest,
    config: TrainConfig,
    plain: CheckpointManifest,
    made: list[torch.fx.GraphModule],
) -> None:
    compiled = run(tmp_path, config.model_copy(update={"compile": True}), store)
    assert made
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[name], tensor, rtol=0, atol=1e-5)


def test_a_run_goes_on_and_its_milestones_are_shorter_runs(
    tmp_path: Path, store: LatentManifest, config: TrainConfig, plain: CheckpointManifest
) -> None:
    short = run(tmp_path / "a", config.model_copy(update={"steps": 6}), store)
    assert tiny.objects(run(tmp_path / "a", config, store)) == tiny.objects(plain)
    run(tmp_path / "b", config.model_copy(update={"milestones": (6,)}), store)
    milestone = CheckpointManifest.read(output(tmp_path / "b", config.model_copy(update={"steps": 6}), store).uri)
    assert (milestone.content, tiny.objects(milestone)) == (short.content, tiny.objects(short))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_through_a_kill(
    tmp_path: Path,
    template: Template,
    store: LatentManifest,
    config: TrainConfig,
    plain: CheckpointManifest,
    parallel: str,
) -> None:
    config = config.model_copy(update={"parallel": parallel})

    def trained(root: Path, **faults: Any) -> CheckpointManifest:
        out = output(root, config, store)
        template.finish(Job(out, config, store, faults=Faults(**faults)))
        return CheckpointManifest.read(out.uri)

    whole = trained(tmp_path / "whole")
    assert tiny.objects(trained(tmp_path / "killed", kills=[(1, 6)], restarts=1)) == tiny.objects(whole)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(whole)[name], tensor, rtol=0, atol=1e-4)


def test_pictures_are_drawn_by_the_merged_model(
    tmp_path: Path, latents: LatentManifest, checkpoint: CheckpointManifest, config: TrainConfig
) -> None:
    init = Init(source=checkpoint.uri)
    recorder = tiny.Recorder()
    run(tmp_path, config.model_copy(update={"init": init, "steps": 2, "sample_every": 2}), latents, recorder)
    assert "samples-000000002.png" in recorder.artifacts


def test_new_classes_must_be_trained(base: CheckpointManifest, config: TrainConfig) -> None:
    card = base.card.model_copy(update={"class_names": ("a", "c", "d")})
    init = Init(source=base.uri, mismatch="reinitialise")
    initial_state(config.model_copy(update={"init": init}), card, Ranks())
    with pytest.raises(InputError, match=f'{TABLE} is made new and must be trained; add the pattern "!{TABLE}"'):
        initial_state(config.model_copy(update={"init": init, "freeze": ()}), card, Ranks())


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        (
            ("blok.*",),
            r"train\.lora\.targets: blok\.\* fits no Linear layer; there are 9, such as t_embedder",
        ),
        (("*.norm1",), r"train\.lora\.targets: \*\.norm1 fits no Linear layer"),
        (("*.mlp.*", "!*"), r"train\.lora\.targets: no Linear layer is left"),
    ],
)
def test_targets_that_cannot_be_meant(
    base: CheckpointManifest, config: TrainConfig, targets: tuple[str, ...], line: str
) -> None:
    lora = LORA.model_copy(update={"targets": targets})
    with pytest.raises(InputError, match=line):
        initial_state(config.model_copy(update={"lora": lora}), base.card, Ranks())


def test_a_random_model_is_not_adapted() -> None:
    with pytest.raises(ValidationError, match=r"lora: adapts a trained model; name it in train\.init\.source"):
        TrainConfig(lora=LORA)


def test_averages_of_factors_are_not_combined() -> None:
    with pytest.raises(ValidationError, match="lora: averages the two factors each"):
        TrainConfig(init=Init(source="there"), lora=LORA, ema_power=(0.1,))


def test_a_dispersive_loss_on_what_is_not_trained_is_refused(
    tmp_path: Path, base: CheckpointManifest, config: TrainConfig, store: LatentManifest
) -> None:
    """The final layer's adapters are behind the block."""
    pushed = config.model_copy(update={"dispersive": Dispersive(block=1), "steps": 1})
    behind = pushed.model_copy(update={"lora": Lora(targets=("final_layer.*",)), "freeze": ()})
    frozen = pushed.model_copy(update={"lora": None, "freeze": ("*", "!final_layer.*")})
    for refused in (behind, frozen):
        with pytest.raises(InputError, match=r"train\.dispersive: nothing up to block 1 is trained"):
            run(tmp_path, refused, store)
    assert run(tmp_path, pushed, store).counts["steps"] == 1
