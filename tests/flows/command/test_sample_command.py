"""``ditflow sample --checkpoint``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit.models.config import DiTConfig
from dit.models.dit import DiT
from flows.command.main import main
from flows.recipe_file import RECIPES

VAE = str(RECIPES.parent / "demo" / "vae")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model for the latents of the demo's autoencoder."""
    path = tmp_path_factory.mktemp("checkpoint") / "dit.pt"
    torch.save({"ema": DiT(DiTConfig(input_size=8, width=32, depth=1, heads=2, num_classes=10)).state_dict()}, path)
    return str(path)


def test_a_picture_and_an_npz_and_no_root(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["sample", "--checkpoint", checkpoint, "--vae", VAE, "--heads", "2", "--set", "sample.steps=2"]
    assert main([*arguments, "--set", "sample.count=3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == ["samples/samples.png", "samples/samples.npz"]
    assert "10 classes, null label 10\n" in printed.err
    assert "assumed: it predicts noise" in printed.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["samples", "samples.npz", "samples.png"]
    with np.load("samples/samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 32, 32, 3)


def test_chosen_classes(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["sample", "--checkpoint", checkpoint, "--vae", VAE, "--heads", "2", "--set", "sample.steps=2"]
    assert main([*arguments, "--class", "3", "--class", "7", "--count", "5"]) == 0, capsys.readouterr().err
    with np.load("samples/samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [3, 3, 3, 7, 7]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--vae", VAE], "no published DiT has width 32; pass --heads"),
        (["--heads", "2"], "the checkpoint does not name its autoencoder"),
        (
            ["--heads", "2", "--vae", VAE, "--set", "sample.stepz=2"],
            "sample.stepz: no such key; did you mean sample.steps?",
        ),
        (
            ["--heads", "2", "--vae", VAE, "--set", "train.steps=2"],
            "--set train: without a recipe there is only sample",
        ),
        (["--heads", "2", "--vae", VAE, "--set", "sample.sampler=heun"], "heun does not fit the model's process"),
        (["--heads", "2", "--vae", VAE, "--classes", "11"], "the model has no null label to guide with; use 1"),
        (["--heads", "2", "--vae", VAE, "--class", "10"], "sample.labels: the model has no class '10'"),
        (["--heads", "2", "--vae", VAE, "--class", "1", "--class", "1"], "--class: 2 classes need to differ"),
        (["--heads", "2", "--vae", VAE, "--class", "1", "--count", "0"], "--count at least one image of each"),
        (["demo"], "sample: pass either a recipe or --checkpoint"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    checkpoint: str, tmp_path: Path, more: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--checkpoint", checkpoint, "--out", str(tmp_path / "out"), *more]) == 2
    *notes, message = capsys.readouterr().err.splitlines()
    assert line in message
    assert not any(note.startswith("error") for note in notes)
    assert not (tmp_path / "out").exists()


def test_neither_recipe_nor_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample"]) == 2
    assert "pass either a recipe or --checkpoint" in capsys.readouterr().err


def test_a_file_that_is_no_dit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert main(["sample", "--checkpoint", str(tmp_path / "x.safetensors"), "--vae", VAE]) == 2
    assert "x.safetensors" in capsys.readouterr().err
