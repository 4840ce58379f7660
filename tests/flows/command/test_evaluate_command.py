"""`ditflow evaluate --samples --reference`: numbers with no recipe and no server."""

import json
from pathlib import Path

import numpy as np
import pytest

from flows.command.main import main
from flows.demo import CLASSIFIER
from flows.demo.digits import digit_images

DIGITS = [
    "--set",
    "evaluate.extractor.name=demo-digits",
    "--set",
    f"evaluate.extractor.weights={CLASSIFIER}",
]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Held-out digits as samples and digits to train on as the reference."""
    monkeypatch.chdir(tmp_path)
    np.savez("samples.npz", digit_images("held_out")[0][:100])
    np.savez("reference.npz", digit_images("train")[0][:200])
    return ["evaluate", "--samples", "samples.npz", "--reference", "reference.npz", "--root", "kept"]


def test_json_has_numbers_and_full_conditions(sources: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*sources, *DIGITS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["distance"].startswith("FD[demo-digits@")
    assert found["metrics"]["fd_low"] < found["metrics"]["fd"] < found["metrics"]["fd_high"]
    assert found["metrics"]["precision_fp32"] > 0.5
    assert found["counts"] == {"samples": 100, "reference": 200, "reference_kept": 200}
    assert {"count", "samples", "reference", "reference_crop", "extractor_sha256", "interval"} <= set(
        found["conditions"]
    )
    assert list(Path("kept", "references").iterdir())


def test_a_table_for_people(sources: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*sources, *DIGITS, "--set", "evaluate.batch_size=64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FD[demo-digits@")
    cells = dict(line.split(maxsplit=1) for line in lines[1:] if line)
    assert float(cells["fd"]) > 0
    assert cells["resolution"] == "32"


def test_without_an_extractor_it_is_inception_whose_weights_are_named(
    sources: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sources) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "weights-inception-2015-12-05-6726825d.pth" in error
    assert "point evaluate.extractor.weights at it" in error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["demo"], "evaluate: pass either a recipe, or --samples and --reference"),
        (["--set", "sample.steps=3"], "--set sample: without a recipe there is only evaluate"),
        (["--set", "evaluate.extractor.name=vgg"], "--set evaluate.extractor.name=vgg: evaluate.extractor.name: Input"),
        (["--reference", "samples.txt"], "samples.txt: neither a folder of images"),
        (["--samples", "none.npz"], "none.npz: no such file"),
    ],
)
def test_wrong_options_are_one_line(
    sources: list[str], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main([*sources, *DIGITS, *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize("options", [[], ["--samples", "samples.npz"], ["--reference", "reference.npz"]])
def test_half_of_it(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *options, "--root", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: evaluate: pass either a recipe, or --samples and --reference\n"
