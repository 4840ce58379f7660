"""The command that converts checkpoints."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file

from dit.models.config import DiTConfig
from dit.models.dit import DiT
from flows.command.main import main
from flows.demo import VAE

WIDTH = 32


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=8, width=WIDTH, depth=2, heads=2, num_classes=10))
    torch.save({"ema": model.state_dict()}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip()


def test_there_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, back = tmp_path / "diffusers", tmp_path / "back.safetensors"
    assert main(["convert", str(source), str(folder), "--to", "diffusers", "--heads", "2"]) == 0
    first, place, assumed, last = capsys.readouterr().out.splitlines()
    assert first == (f"DiT of depth 2, width {WIDTH}, 2 heads, patches of 2, latents 4x8x8, 10 classes, null label 10")
    assert (place, last) == ("read from ema", f"written to {folder}")
    assert assumed.startswith("assumed: it predicts noise")
    assert assumed.endswith("--process gaussian confirms")
    assert DiTTransformer2DModel.from_pretrained(folder).config.num_attention_heads == 2
    assert main(["convert", str(folder), str(back), "--to", "reference"]) == 0
    weights = torch.load(source, weights_only=True)["ema"]
    found = load_file(back)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_a_pipeline_and_how_to_load_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "pipeline"
    assert main(["convert", str(source), str(folder), "--to", "pipeline", "--heads", "2", "--vae", str(VAE)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    call = last.removeprefix("load it with ")
    assert call != last
    pipeline = eval(call, {"DiffusionPipeline": DiffusionPipeline})
    assert pipeline([1], num_inference_steps=2).images[0].size == (32, 32)


def test_input_that_is_wrong(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ("--to", "reference")
    assert error(capsys, source, source, *to, "--heads", "2") == f"{source}: exists already; name another destination"
    assert error(capsys, source, tmp_path / "x.pt", *to).endswith("no published DiT has width 32; pass --heads")
    assert error(capsys, tmp_path / "none.pt", tmp_path / "x.pt", *to) == f"{tmp_path}/none.pt: no such file"
    assert "not a checkpoint; name a" in error(capsys, tmp_path / "none", tmp_path / "x.pt", *to)
    missing = error(capsys, source, tmp_path / "x", "--to", "pipeline", "--heads", "2", "--vae", str(tmp_path / "none"))
    assert f"{tmp_path}/none/config.json: no such object" in missing
    assert list(tmp_path.iterdir()) == [source]


def test_a_layout_must_be_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(source), str(tmp_path / "x.pt")])
    assert stop.value.code == 2


def test_starts_no_prefect(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from flows.command.main import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'prefect', 'mlflow', 'diffusers'} & sys.modules.keys()"
    )
    command = ["convert", str(source), str(tmp_path / "x"), "--to", "diffusers", "--heads", "2"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_the_file_does_not_record(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = torch.load(source, weights_only=True)["ema"]
    del weights["pos_embed"]
    torch.save(weights, source)
    told = ["--heads", "2", "--latent-size", "8", "--classes", "11", "--process", "gaussian"]
    assert main(["convert", str(source), str(tmp_path / "x.pt"), "--to", "reference", *told]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("11 classes, null label 11 (not trained, so sample with guidance_scale 1)")
    assert last == f"written to {tmp_path / 'x.pt'}"
    with pytest.raises(SystemExit):
        main(["convert", str(source), str(tmp_path / "y.pt"), "--to", "reference", "--process", "edm"])
    assert "invalid choice: 'edm' (choose from" in capsys.readouterr().err


def test_a_flow_and_its_classes_are_told_once(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that is written knows them, and needs no option but the number of heads."""
    (tmp_path / "names.txt").write_text("".join(f"n{number}\n" for number in range(10)))
    told = ["--process", "reversed-flow", "--class-names", str(tmp_path / "names.txt"), "--heads", "2"]
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--to", "reference", *told]) == 0
    first, *notes = capsys.readouterr().out.splitlines()
    assert first.endswith("10 classes, null label 10, velocity of a flow on the linear path")
    assert any(note.startswith("its time was turned round") for note in notes)
    sample = ["sample", "--checkpoint", str(tmp_path / "x.safetensors"), "--heads", "2", "--vae", str(VAE)]
    chosen = ["--class", "n3", "--class", "n9", "--count", "2", "--set", "sample.steps=2"]
    assert main([*sample, *chosen, "--out", str(tmp_path / "drawn")]) == 0
    with np.load(tmp_path / "drawn" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [3, 9]
