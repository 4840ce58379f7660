"""The recipe of a model's life, with its own steps: 600, then 1,200 by one ``--set``, against 1,200 at once."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from faults import MlflowServer
from mlflow import MlflowClient
from test_pipeline import states

from dit.sample import SampleManifest
from flows.command.main import main
from storage.manifest import Manifest
from storage.rows.store import RowReader

FAST = {
    "train.batch_size": 16,
    "train.model.size": "{depth: 1, width: 32, heads: 2}",
    "train.held_out.images": 40,
    "sample.count": 40,
    "sample.steps": 10,
    "evaluate_milestones.sample.count": 20,
}
LONGER = ("--set", "train.steps=1200")
AT_ONCE = {
    "train.milestones": "null",
    "train.held_out": "null",
    "evaluate_milestones": "null",
    "registry.checkpoint": "last",
}


def said(command: str, root: Path, *more: str, values: dict[str, Any] = FAST) -> dict[str, Any]:
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    recipe = ["demo", "--recipe", "demo-milestones"] if command == "demo" else [command, "demo-milestones"]
    with redirect_stdout(io.StringIO()) as out:
        assert main([*recipe, "--root", str(root), "--json", *sets, *more]) == 0
    return dict(json.loads(out.getvalue()))


def weights(report: dict[str, Any]) -> dict[str, str]:
    (train,) = (Manifest.read(stage["manifest"]) for stage in report["stages"] if stage["name"] == "train")
    return {entry.path: entry.sha256 for entry in train.files if entry.path.endswith(".safetensors")}


@pytest.mark.full
def test_the_life_of_a_model(tmp_path: Path, prefect_api: str, mlflow_server: MlflowServer) -> None:
    first = said("demo", tmp_path / "root")
    points = [(each["step"], each["state"]) for each in first["milestones"] if each["name"] == "evaluate"]
    assert points == [(200, "ran"), (400, "ran"), (600, "ran")]

    longer = said("demo", tmp_path / "root", *LONGER)
    points = [(each["step"], each["state"]) for each in longer["milestones"] if each["name"] == "evaluate"]
    assert points == [(step, "skipped" if step <= 600 else "ran") for step in range(200, 1201, 200)]
    assert states(longer)["encode held_out"] == "skipped"
    less = {key: value for key, value in FAST.items() if "milestones" not in key}
    at_once = said("demo", tmp_path / "other", *LONGER, values=less | AT_ONCE)
    assert weights(longer) == weights(at_once)
    assert len(weights(longer)) == 2

    client, run_id = MlflowClient(), longer["mlflow_run_ids"]["train"]
    for name in ("fd", "fd_low", "fd_high", "recognised"):
        steps = [metric.step for metric in client.get_metric_history(run_id, f"milestone_{name}")]
        assert sorted(steps) == [step for step, _ in points]
    held_out = {metric.step for metric in client.get_metric_history(run_id, "held_out_loss")}
    assert held_out == set(range(50, 1201, 50))
    assert held_out < {metric.step for metric in client.get_metric_history(run_id, "loss")}
    pages = [path.read_text() for path in (tmp_path / "root" / "reports").glob("*/report.html")]
    (page,) = (text for text in pages if "step 1,200" in text)
    strips = re.findall(r"<span>step ([\d,]+)</span>", page)
    # Behind them come those of the recipe's own samples, which are of the best step of either run.
    assert strips[:6] == ["200", "400", "600", "800", "1,000", "1,200"]

    drawn = said("sample", tmp_path / "root", *LONGER, "--class", "3", "--class", "7", "--count", "8")
    samples = SampleManifest.read(drawn["stages"][0]["manifest"])
    assert sorted(RowReader(samples).array("label").tolist()) == [3] * 4 + [7] * 4
