"""What the shell offers on the tab key."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

DITFLOW = str(Path(sys.executable).with_name("ditflow"))


def completed(line: str, folder: Path) -> list[str]:
    """The words that may stand in the place of the line's last one, as the function of bash asks for them."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "offered")}
    subprocess.run([DITFLOW], env=os.environ | asked, cwd=folder, check=True)
    return [word.strip() for word in (folder / "offered").read_text().split("\n") if word]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ditflow ru", ["run"]),
        ("ditflow run demo-f", ["demo-flow"]),
        ("ditflow run --set train.st", ["train.steps="]),
        ("ditflow run --set train.flips=", ["train.flips=true", "train.flips=false"]),
        ("ditflow init mine.yaml --from demo-fl", ["demo-flow"]),
        ("ditflow convert a b --to ref", ["reference"]),
    ],
)
def test_words(line: str, offered: list[str], tmp_path: Path) -> None:
    assert completed(line, tmp_path) == offered


def test_files_and_models(tmp_path: Path, tracking_template: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    assert completed("ditflow run m", tmp_path) == ["mine.yaml"]
    (tmp_path / "runs").mkdir()
    shutil.copy(tracking_template, tmp_path / "runs" / "mlflow.db")
    MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}").create_registered_model("my-model")
    assert completed("ditflow promote my", tmp_path) == ["my-model"]
