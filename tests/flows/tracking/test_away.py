"""The Prefect server is taken away from a flow in the middle of its training, and comes back."""

import os
import re
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import pytest
from faults import all_gone, descendants, start
from launching import TINY
from mlflow import MlflowClient
from pipelines import STAGES as RECIPE
from pipelines import arguments, ditflow
from prefect_rest import PASSWORD, call
from until import until

from flows import servers
from flows.contract import STAGES
from flows.tracking import database as tracking
from storage.latents import LatentManifest

ONCE = ("--set", "train.held_out=null")
"""Every stage runs once: no held-out images are encoded."""

FLOW = """
import sys
from pathlib import Path
from dit.training.config import TrainConfig
from flows.perform import RunSettings
from flows.stages import train
config = TrainConfig.model_validate_json(sys.argv[2])
train(latents=sys.argv[1], config=config, settings=RunSettings(root=str(Path(sys.argv[1]).parents[1])))
"""


@pytest.mark.full
def test_a_command_starts_its_own_server_again(
    tmp_path: Path, digits: Path, migrated: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    migrated(tmp_path)
    with subprocess.Popen(ditflow(*arguments("run", tmp_path, digits, *ONCE, "--set", "train.steps=100"))) as command:
        until(lambda: any(steps(folder) for folder in tmp_path.glob("train/*")))
        (server,) = [each for each in psutil.Process(command.pid).children() if "server" in each.cmdline()]
        server.kill()
        assert command.wait() == 0
    assert Counter(flow_runs(tmp_path)) == Counter((name, "COMPLETED") for name in ["demo", *RECIPE])


@pytest.mark.full
def test_two_commands_begin_a_root_at_once(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    run = ditflow(*arguments("run", tmp_path, digits, *ONCE))
    with subprocess.Popen(run) as one, subprocess.Popen(run) as other:
        assert (one.wait(), other.wait()) == (0, 0)
    assert Counter(flow_runs(tmp_path)) == Counter(2 * [(name, "COMPLETED") for name in ["demo", *RECIPE]])
    client = MlflowClient(tracking.address(tmp_path))
    assert [version.version for version in client.search_model_versions()] == [1]
    runs = client.search_runs([client.get_experiment_by_name("ditflow").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == len(RECIPE) + 1


def flow_runs(root: Path) -> list[tuple[str, str]]:
    """Names, without the id of the pipeline, and states of the flow runs in a root's own Prefect database."""
    with closing(sqlite3.connect(root / "prefect" / "prefect.db")) as database:
        found = database.execute("SELECT name, state_type FROM flow_run").fetchall()
    return [(re.sub(r"(demo)-[0-9a-f]{8}$|demo-[0-9a-f]{8} ", r"\1", name), state) for name, state in found]


def steps(folder: Path) -> int:
    """Of the newest checkpoint."""
    names = [path.name for path in folder.glob("checkpoints/step-*")]
    return int(max(names, default="step-0").rpartition("-")[2])


def state_of_the_run(address: str) -> str:
    (run,) = call(address, "/flow_runs/filter", {})
    return str(run["state"]["type"])


@pytest.mark.full
def test_training_goes_on_without_the_prefect_server(
    tmp_path: Path,
    latents: LatentManifest,
    migrated: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TINY.model_copy(update={"steps": 3000, "checkpoint_every": 20})
    port, folder = (
        servers.free_port(),
        Path(STAGES["train"].output(str(Path(latents.uri).parents[1]), config, latents).uri),
    )
    monkeypatch.setenv("PREFECT_API_URL", f"http://{servers.HOST}:{port}/api")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
    migrated(tmp_path)
    with ExitStack() as stack:
        before = set(descendants())
        stack.enter_context(servers.prefect_server(tmp_path / "prefect", port, password=PASSWORD))
        pids = [pid for pid in descendants() if pid not in before]
        flow = stack.enter_context(start(FLOW, latents.uri, config.model_dump_json()))
        until(lambda: steps(folder) > 0)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: all_gone(pids))
        reached = steps(folder)
        until(lambda: steps(folder) > reached + 50)
        server = stack.enter_context(servers.prefect_server(tmp_path / "prefect", port, password=PASSWORD))
        output, _ = flow.communicate()
        assert flow.returncode == 0, output
        assert state_of_the_run(server.address) == "COMPLETED"
    assert STAGES["train"].kind.read(str(folder)).counts["steps"] == config.steps
