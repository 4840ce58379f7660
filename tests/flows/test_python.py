"""The package as a library of Python: the page about it runs as it stands."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.contract import ENCODE_HELD_OUT, Outcome
from storage.errors import InputError
from storage.latents import LatentManifest

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "how-to" / "python.md"
SERVERS = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "DITFLOW_ROOT")


def run(folder: Path) -> list[str]:
    """The lines that the page's snippets print, run as one script in a folder."""
    script = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    (folder / "page.py").write_text(script)
    env = {name: value for name, value in os.environ.items() if name not in SERVERS} | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "page.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.full
def test_the_page_runs_as_it_stands_and_skips_what_is_done(tmp_path: Path, migrated: Callable[[Path], None]) -> None:
    migrated(tmp_path / "runs")
    first, again = run(tmp_path), run(tmp_path)
    stages = ["shard", "encode", "train", "sample", "evaluate", "register"]
    assert [line.split()[:2] for line in first[:6]] == [[name, "ran"] for name in stages]
    assert [line.split()[:2] for line in again[:6]] == [[name, "skipped"] for name in stages]
    assert first[6:8] == again[6:8]  # metrics, parameters and run
    assert first[8] == f"(10, 32, 32, 3) {tuple(map(str, range(10)))}"
    assert [line.split()[0] for line in first[9:19]] == [str(step) for step in range(1, 11)]
    assert re.fullmatch(r"\d+ \(\d+ to \d+\)", first[19])
    assert first[9:] == again[9:]


def test_an_outcome_gives_its_manifest(latents: LatentManifest) -> None:
    for name in ("encode", ENCODE_HELD_OUT):
        output = Outcome(name, "ran", 1.0, latents.url).output
        assert isinstance(output, LatentManifest)
        assert output.digest == latents.digest
    with pytest.raises(InputError):
        _ = Outcome("encode", "ran", 1.0, f"{latents.url}-gone").output
