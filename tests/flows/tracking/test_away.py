"""The Prefect server is taken away from a flow in the middle of its training, and comes back."""

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults import all_gone, descendants, start
from launching import TINY
from prefect_rest import PASSWORD, call
from until import until

from flows import servers
from flows.contract import STAGES
from storage.latents import LatentManifest

FLOW = """
import sys
from pathlib import Path
from dit.train import TrainConfig
from flows.perform import RunSettings
from flows.stages import train
config = TrainConfig.model_validate_json(sys.argv[2])
train(latents=sys.argv[1], config=config, settings=RunSettings(root=str(Path(sys.argv[1]).parents[1])))
"""


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
