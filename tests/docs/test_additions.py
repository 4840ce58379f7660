"""The examples of docs/contributing: each diff applies as it is, and the lines below it hold."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
WRITE_SCHEMA = """
from flows.recipe_schema import PATH
from flows.write_schema import written
PATH.write_text(written(), "utf-8")
"""


@pytest.mark.parametrize("what", ["archive", "extractor", "model", "process", "sampler"])
def test_the_documented_addition_applies_and_works(what: str, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "contributing" / f"{what}.md").read_text()
    (diff,), (code,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("diff", "python"))
    for package in ("flows", "dit", "storage"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WRITE_SCHEMA + code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
