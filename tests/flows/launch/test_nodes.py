"""Two torchruns as two machines, of which one is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from faults import descendants
from launching import LOG, TINY, Noted, job
from until import until

from flows import servers
from flows.contract import STAGES
from flows.launch import start as launcher
from flows.launch import torchrun
from flows.launch.rank_log import WorkerError
from flows.launch.spec import LocalLaunch, NodesLaunch
from storage.latents import LatentManifest
from storage.tracker import NullTracker

pytestmark = pytest.mark.full
CONFIG = TINY.model_copy(update={"steps": 800, "checkpoint_every": 20, "log_every": 10})
NODE = """
import logging, sys
from pathlib import Path
from flows.launch import start as launcher
from flows.launch.spec import WorkerSpec

launcher.RESTART_DELAY_SECONDS = 1
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
spec = WorkerSpec.model_validate_json(Path(sys.argv[1]).read_text())
nodes = launcher.NodesLaunch(kind="nodes", nodes=2, nproc=1, address=sys.argv[2], max_restarts=1)
launcher.run(spec, nodes, progress=lambda done, *_: print("step", done, flush=True), log=logging.getLogger())
"""


@dataclass
class Machines:
    """Launchers that were given the same command."""

    folder: Path
    address: str = field(default_factory=lambda: f"{servers.HOST}:{servers.free_port()}")
    running: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    def start(self, name: str) -> None:
        command = [sys.executable, "-c", NODE, str(self.folder / "job.json"), self.address]
        with (self.folder / name).open("wb") as output:
            self.running[name] = subprocess.Popen(command, stdout=output, stderr=output)

    def kill(self, name: str) -> None:
        """SIGKILL to a launcher, its torchrun and its ranks."""
        process = self.running.pop(name)
        for pid in (process.pid, *descendants(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.wait()

    def said(self, name: str) -> str:
        return (self.folder / name).read_text()

    def reached(self, step: int) -> str:
        """The machine of the first rank, when that many steps are taken."""
        until(lambda: max(map(self.step, self.running)) >= step)
        return max(self.running, key=self.step)

    def step(self, name: str) -> int:
        """The last one of which the first rank told this machine."""
        return max(map(int, re.findall(r"^step (\d+)$", self.said(name), re.M)), default=0)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    found = Machines(tmp_path)
    yield found
    for name, process in list(found.running.items()):
        if process.poll() is None:
            found.kill(name)


def losses(folder: Path) -> dict[int, float]:
    """By step, as the newest checkpoint tells them."""
    record = json.loads(max(folder.rglob("record.json")).read_text())
    return {entry["step"]: entry["values"]["loss"] for entry in record["history"]}


def test_a_killed_machine_comes_back_or_is_gone_for_good(
    tmp_path: Path,
    latents: LatentManifest,
    lines: pytest.LogCaptureFixture,
    machines: Machines,
) -> None:
    """First the other one waits for it, then a launch with one rank goes on without it: always the same curve."""
    spec = job(latents, CONFIG)
    STAGES["train"].run(CONFIG, latents, out=spec.output, tracker=NullTracker())
    expected = losses(Path(spec.output.uri))
    shutil.rmtree(spec.output.uri)
    (tmp_path / "job.json").write_text(spec.model_dump_json())
    machines.start("one")
    machines.start("two")
    machines.kill(machines.reached(100))
    (other,) = machines.running
    until(lambda: "restarting all ranks (1 of 1)" in machines.said(other))
    machines.start("three")
    machines.reached(300)
    machines.kill("three")
    assert machines.running[other].wait(500) == 1
    launcher.run(spec, LocalLaunch(nproc=1), progress=Noted(), log=LOG)
    logs = [machines.said(other) + machines.said("three"), *lines.messages]
    begun = [int(step) for log in logs for step in re.findall(r"resuming after step (\d+)", log)]
    assert 60 <= begun[0] <= begun[1] < CONFIG.steps
    found = losses(Path(spec.output.uri))
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


def test_a_machine_does_not_wait_for_the_others_for_ever(
    latents: LatentManifest,
    lines: pytest.LogCaptureFixture,
    nothing_left: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torchrun, "JOIN_TIMEOUT_SECONDS", 2)
    address = f"{servers.HOST}:{servers.free_port()}"
    with pytest.raises(WorkerError, match="not all nodes joined within 2 s; run the same command on every node"):
        launcher.run(job(latents, TINY), NodesLaunch(kind="nodes", address=address), progress=Noted(), log=LOG)
    assert not any("restarting all ranks" in line for line in lines.messages)
