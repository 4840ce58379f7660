"""Runs that start from the weights of another one, and train a part of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from beginning import output, run, weights
from forked import Faults, Job, Template
from pydantic import ValidationError

from dit.export import CheckpointManifest
from dit.models.build import build
from dit.ranks import Ranks
from dit.training.config import Init, TrainConfig
from dit.training.origin import NAME
from dit.training.start import initial_state
from dit.training.trainable import choose
from storage.errors import InputError
from storage.latents import LatentManifest

CONFIG = tiny.TRAINING.model_copy(update={"seed": 3, "freeze": ("blocks.0.mlp.*", "t_embedder.*")})
BIASES = ("*", "!*.bias", "!y_embedder.*")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, store: LatentManifest) -> CheckpointManifest:
    """A trained model, whose EMA is not its raw weights."""
    config = tiny.TRAINING.model_copy(update={"steps": 4})
    return tiny.run_train(tmp_path_factory.mktemp("base"), config, store)


@pytest.fixture(scope="module")
def config(base: CheckpointManifest) -> TrainConfig:
    return CONFIG.model_copy(update={"init": Init(source=base.uri)})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, store: LatentManifest, config: TrainConfig) -> CheckpointManifest:
    return run(tmp_path_factory.mktemp("plain"), config, store)


def frozen(manifest: CheckpointManifest, patterns: tuple[str, ...]) -> set[str]:
    """The names of the parameters that the patterns freeze, the fixed table included."""
    with torch.device("meta"):
        model = build(manifest.card.model)
    choose(model, patterns, None)
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(("which", "file"), [("ema", "model.safetensors"), ("raw", "model-raw.safetensors")])
def test_weights_and_averages_are_the_given_ones(
    base: CheckpointManifest, config: TrainConfig, which: str, file: str
) -> None:
    init = Init(source=f"{base.uri}/manifest.json", weights=which)
    state = initial_state(config.model_copy(update={"init": init, "ema_decays": (0.9,)}), base.card, Ranks())
    given = weights(base, file)
    assert state.optimizer.state == {}
    for found in (state.model.state_dict(), *(average.weights() for average in state.averages.values())):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_what_is_frozen_keeps_its_bits_and_has_no_moments(
    base: CheckpointManifest, plain: CheckpointManifest, config: TrainConfig
) -> None:
    given, names = weights(base), frozen(base, config.freeze)
    for file in plain.card.weights:
        found = weights(plain, file)
        kept = {name for name in given if torch.equal(found[name], given[name])}
        assert kept == names
    (record,) = Path(plain.uri).glob("checkpoints/step-000000012/record.json")
    slots = {name.split(".")[1] for name in json.loads(record.read_bytes())["index"] if name.startswith("optimizer.")}
    assert len(slots) == len(given) - len(names)


def test_the_source_is_a_parent(base: CheckpointManifest, plain: CheckpointManifest, config: TrainConfig) -> None:
    assert plain.inputs[NAME] == base.digest
    assert plain.parent(NAME, CheckpointManifest).content == base.content
    assert plain.config["init"]["source"] == base.uri
    assert config.identity()["init"] == {"weights": "ema"}


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_run_ends_in_the_same_bits(
    tmp_path: Path, store: LatentManifest, config: TrainConfig, plain: CheckpointManifest, step: int
) -> None:
    with pytest.raises(tiny.Killed):
        run(tmp_path, config, store, tiny.Killer(step))
    assert tiny.objects(run(tmp_path, config, store)) == tiny.objects(plain)


def test_more_steps_go_on_and_milestones_are_shorter_runs(
    tmp_path: Path, store: LatentManifest, config: TrainConfig, plain: CheckpointManifest
) -> None:
    short = run(tmp_path / "a", config.model_copy(update={"steps": 6}), store)
    recorder = tiny.Recorder()
    assert tiny.objects(run(tmp_path / "a", config, store, recorder)) == tiny.objects(plain)
    assert min(done for done, _, _ in recorder.steps) == 7
    run(tmp_path / "b", config.model_copy(update={"milestones": (6,)}), store)
    milestone = CheckpointManifest.read(output(tmp_path / "b", config.model_copy(update={"steps": 6}), store).uri)
    assert (milestone.content, tiny.objects(milestone)) == (short.content, tiny.objects(short))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_on_two_ranks_through_a_kill(
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
    assert whole.metrics["final_loss"] == pytest.approx(plain.metrics["final_loss"], rel=1e-4)
    for name in frozen(plain, config.freeze):
        assert torch.equal(weights(whole)[name], weights(plain)[name])


def test_new_classes_are_named_and_made_new(
    tmp_path: Path, base: CheckpointManifest, config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    table = "y_embedder.embedding_table.weight"
    card = base.card.model_copy(update={"class_names": ("a", "c", "d")})
    with pytest.raises(InputError, match=f"does not fit: {table} .new classes d.; set train.init.mismatch=reinit"):
        initial_state(config, card, Ranks())
    new = config.model_copy(update={"init": Init(source=base.uri, mismatch="reinitialise")})
    state = initial_state(new, card, Ranks())
    found, given = state.model.state_dict()[table], weights(base)[table]
    random = initial_state(new.model_copy(update={"init": None}), card, Ranks()).model.state_dict()[table]
    assert torch.equal(found, torch.stack([given[0], given[2], random[2], given[3]]))
    assert torch.equal(state.averages["ema"].state_dict()[table], found)
    assert f"{base.uri}: {table} (new classes d)" in caplog.text


def test_what_is_new_is_not_frozen(base: CheckpointManifest, config: TrainConfig) -> None:
    init = Init(source=base.uri, mismatch="reinitialise")
    new = config.model_copy(update={"init": init, "freeze": ("y_*",)})
    card = base.card.model_copy(update={"class_names": ("a", "c", "d")})
    with pytest.raises(InputError, match=r'y_embedder\S* is made new and must be trained; add the pattern "!y_emb'):
        initial_state(new, card, Ranks())


def test_biases_alone(base: CheckpointManifest) -> None:
    names = weights(base).keys()
    trained = names - frozen(base, BIASES)
    assert trained == {name for name in names if name.endswith(".bias") or name.startswith("y_embedder.")}


@pytest.mark.parametrize(
    ("patterns", "line"),
    [
        (("blocks.*", "blok.*"), "train.freeze: blok.* fits no parameter; there are 21, such as "),
        (("pos_embed",), "train.freeze: pos_embed fits no parameter"),
        (("*",), "train.freeze: no parameter is left to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(
    base: CheckpointManifest, config: TrainConfig, patterns: tuple[str, ...], line: str
) -> None:
    with pytest.raises(InputError) as caught:
        initial_state(config.model_copy(update={"freeze": patterns}), base.card, Ranks())
    assert str(caught.value).startswith(line)


def test_an_exception_without_a_rule_is_refused() -> None:
    with pytest.raises(ValidationError, match="!y_embedder.* comes first; begin with what to freeze"):
        TrainConfig(freeze=("!y_embedder.*",))
