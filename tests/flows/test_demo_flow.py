"""The demo and the demo as a flow, with a third of their steps: the flow is ahead, and its report shows both."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from faults import MlflowServer

from dit.metrics.comparison import gain
from flows.command.main import main


def run(recipe: str, root: Path) -> dict[str, Any]:
    with redirect_stdout(io.StringIO()) as said:
        assert main(["demo", "--recipe", recipe, "--root", str(root), "--json", "--set", "train.steps=400"]) == 0
    return dict(json.loads(said.getvalue()))


@pytest.mark.full
def test_the_flow_is_ahead_of_the_demo_and_stands_beside_it(
    tmp_path: Path, prefect_api: str, mlflow_server: MlflowServer, migrated: Callable[[Path], None]
) -> None:
    migrated(tmp_path)
    demo, flow = (run(recipe, tmp_path) for recipe in ("demo", "demo-flow"))
    assert [stage["name"] for stage in flow["stages"] if stage["state"] == "skipped"] == ["shard", "encode"]
    before, after = demo["metrics"], flow["metrics"]
    assert after["recognised"] > max(0.6, before["recognised"])
    better = gain("fd", "lower", before, after)
    assert better.value > better.margin, (before, after)  # beyond the interval
    pages = [page.read_text() for page in tmp_path.glob("reports/*/report.html")]
    (both,) = [page for page in pages if "Other processes and samplers" in page]
    assert str(gain("fd", "lower", after, before)) in both
