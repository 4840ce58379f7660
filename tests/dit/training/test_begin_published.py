"""Fine-tuning from a file of others, in a published layout, on other classes and another number of them."""

import logging
import shutil
from pathlib import Path
from typing import Any

import plain_dit
import pytest
import tiny
import torch
from beginning import run, weights

from dit.convert import read, write
from dit.diffusion.config import FlowConfig
from dit.ranks import Ranks
from dit.train import card_for
from dit.training.config import Init, TrainConfig
from dit.training.origin import NAME
from dit.training.start import initial_state
from storage import uri
from storage.errors import InputError
from storage.latents import LatentManifest

TABLE = "y_embedder.embedding_table.weight"
HEAD = {"final_layer.linear.weight", "final_layer.linear.bias"}


@pytest.fixture(scope="module")
def tensors(store: LatentManifest) -> dict[str, torch.Tensor]:
    """Of a DiT of ten classes."""
    channels, side, _ = store.latent_shape
    return plain_dit.random_file(
        side, heads=2, width=32, depth=1, channels=channels, outputs=2 * channels, patch=2, classes=10
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> str:
    """As training scripts save it."""
    place = tmp_path_factory.mktemp("published") / "0400000.pt"
    raw = {name: tensor + 1 for name, tensor in tensors.items() if name != "pos_embed"}
    whole = {"model": raw, "ema": {f"module.{name}": tensor for name, tensor in tensors.items()}, "opt": {"state": {}}}
    torch.save(whole, place)
    return str(place)


@pytest.fixture
def config(file: str) -> TrainConfig:
    return tiny.TRAINING.model_copy(update={"init": Init(source=file, mismatch="reinitialise"), "steps": 4})


def test_other_classes_are_refused_unless_they_may_be_new(
    config: TrainConfig, store: LatentManifest, file: str
) -> None:
    refusing = config.model_copy(update={"init": Init(source=file)})
    line = f"{TABLE} .10 classes without names there, {len(store.class_names)} here.; set train.init.mismatch=reinit"
    with pytest.raises(InputError, match=line):
        initial_state(refusing, card_for(refusing, store), Ranks())


def test_all_but_the_classes_comes_from_the_averages_of_the_file(
    config: TrainConfig, store: LatentManifest, tensors: dict[str, torch.Tensor]
) -> None:
    state = initial_state(config, card_for(config, store), Ranks())
    plain = config.model_copy(update={"init": None})
    new = initial_state(plain, card_for(plain, store), Ranks()).model.state_dict()[TABLE]
    for found in (state.model.state_dict(), state.averages["ema"].state_dict()):
        same = {name for name, tensor in found.items() if name != TABLE and torch.equal(tensor, tensors[name])}
        assert same | {TABLE, "pos_embed"} == tensors.keys()  # the fixed table has no average
        assert torch.equal(found[TABLE], torch.cat([new[:-1], tensors[TABLE][-1:]]))


def test_a_run_ends_in_the_same_bits_through_a_kill_and_knows_its_file(
    tmp_path: Path, config: TrainConfig, store: LatentManifest, file: str
) -> None:
    config = config.model_copy(update={"checkpoint_every": 2})
    whole = run(tmp_path / "whole", config, store)
    with pytest.raises(tiny.Killed):
        run(tmp_path / "killed", config, store, tiny.Killer(3))
    recorder = tiny.Recorder()
    resumed = run(tmp_path / "killed", config, store, recorder)
    assert [done for done, _, _ in recorder.steps] == [3, 4]
    assert tiny.objects(resumed) == tiny.objects(whole)
    assert whole.inputs[NAME] == uri.file_sha256(file)
    assert (whole.card.class_names, len(weights(whole)[TABLE])) == (store.class_names, len(store.class_names) + 1)
    assert whole.metrics["final_loss"] > 0


@pytest.mark.parametrize("process", ["flow", "reversed-flow"])
def test_a_flow_is_converted_first_and_trained_on_as_one(
    tmp_path: Path, config: TrainConfig, store: LatentManifest, file: str, caplog: Any, process: Any
) -> None:
    """Its unused outputs are gone, so the head fits; and the converted file says what it is."""
    write(read(file, heads=2, process=process), str(tmp_path / "sit.safetensors"), "reference")
    flow = config.model_copy(
        update={
            "diffusion": FlowConfig(times="logit_normal"),
            "init": Init(source=str(tmp_path / "sit.safetensors"), mismatch="reinitialise"),
        }
    )
    assert run(tmp_path, flow, store).card.diffusion == flow.diffusion
    assert f"{TABLE} (10 classes without names there" in caplog.text
    assert not any(name in caplog.text for name in HEAD)
    assert "trained for another process" not in caplog.text


def test_a_file_that_needs_an_option_is_to_be_converted(
    tmp_path: Path, config: TrainConfig, store: LatentManifest, file: str
) -> None:
    named = shutil.copy(file, tmp_path / "SiT-XL-2.pt")
    init = config.model_copy(update={"init": Init(source=str(named))})
    with pytest.raises(InputError) as caught:
        initial_state(init, card_for(init, store), Ranks())
    assert str(caught.value).startswith(f"train.init.source: {named}: is named after SiT")
    assert str(caught.value).endswith("; pass it to ditflow convert, and start from the file that this writes")


def test_classes_are_matched_by_the_names_that_convert_was_told(
    tmp_path: Path, config: TrainConfig, store: LatentManifest, file: str, tensors: dict[str, torch.Tensor]
) -> None:
    (tmp_path / "names.txt").write_text("\n".join(["w", "c", "x", "a", *"mnopqr"]))
    write(read(file, heads=2, class_names=str(tmp_path / "names.txt")), str(tmp_path / "x.safetensors"), "reference")
    named = config.model_copy(update={"init": Init(source=str(tmp_path / "x.safetensors"), mismatch="reinitialise")})
    found = initial_state(named, card_for(named, store), Ranks()).model.state_dict()[TABLE]
    assert store.class_names == ("a", "b", "c")
    assert torch.equal(found[[0, 2, 3]], tensors[TABLE][[3, 1, 10]])


def test_a_file_of_another_process_is_said(
    config: TrainConfig, store: LatentManifest, caplog: pytest.LogCaptureFixture
) -> None:
    flow = config.model_copy(update={"diffusion": FlowConfig()})
    caplog.set_level(logging.INFO)
    initial_state(flow, card_for(flow, store), Ranks())
    assert "was trained for another process than train.diffusion" in caplog.text
    assert "0400000.pt: assumed: it predicts noise" in caplog.text
