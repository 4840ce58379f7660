"""Training as a job of a real Slurm: followed, cancelled, found again, preempted."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import start
from launching import ENDLESS, LOG, TINY, Noted, job
from slurm_cluster import reason_not_to, slurm_cluster
from until import until

from dit.training.config import TrainConfig
from flows.contract import STAGES
from flows.launch import start as launcher
from flows.launch.spec import LocalLaunch, SlurmLaunch, WorkerSpec
from storage.errors import InputError
from storage.latents import LatentManifest

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(reason_not_to() is not None, reason=str(reason_not_to())),
]
TWO_NODES = SlurmLaunch(kind="slurm", nodes=2, poll_seconds=0.5)
LONG = TINY.model_copy(update={"steps": 1600, "checkpoint_every": 20, "log_every": 10})


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as env, pytest.MonkeyPatch.context() as patch:
        for name, value in (env | {"GLOO_SOCKET_IFNAME": "lo"}).items():
            patch.setenv(name, value)
        yield


def queue() -> list[str]:
    done = subprocess.run(["squeue", "--noheader", "--format=%i %T"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def steps(spec: WorkerSpec) -> int:
    """Of the newest checkpoint."""
    names = [path.name for path in (Path(spec.output.uri) / "checkpoints").glob("step-*")]
    return int(max(names, default="step-0").rpartition("-")[2])


LAUNCH = """
import logging, sys
from pathlib import Path
from flows.launch import start as launcher
from flows.launch.spec import SlurmLaunch
from flows.launch.spec import WorkerSpec
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
spec = WorkerSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
log = logging.getLogger("flow")
launcher.run(spec, SlurmLaunch(kind="slurm", nodes=2, poll_seconds=0.5), progress=lambda *_: None, log=log)
"""


def flow(tmp_path: Path, spec: WorkerSpec) -> "subprocess.Popen[str]":
    """A process that launches the job and follows it."""
    (tmp_path / "flow.json").write_text(spec.model_dump_json())
    return start(LAUNCH, tmp_path / "flow.json")


def test_a_job_on_two_nodes_runs_and_reports(
    latents: LatentManifest,
    lines: pytest.LogCaptureFixture,
) -> None:
    noted, spec = Noted(), job(latents, TINY)
    launcher.run(spec, TWO_NODES, progress=noted, log=LOG)
    assert STAGES["train"].kind.read(spec.output.uri).counts["steps"] == 4
    assert noted.progress[-1] == (4, 4, "steps")
    assert "Slurm job " in lines.messages[0]
    assert queue() == []


def test_a_cancelled_flow_cancels_its_job(tmp_path: Path, latents: LatentManifest) -> None:
    spec = job(latents, ENDLESS)
    with flow(tmp_path, spec) as process:
        until(lambda: (Path(spec.output.uri) / "slurm" / "job.log").exists())
        process.send_signal(signal.SIGINT)
        process.communicate()
    until(lambda: queue() == [], 0.2)


def test_a_killed_flow_is_followed_by_the_next(
    tmp_path: Path,
    latents: LatentManifest,
    lines: pytest.LogCaptureFixture,
) -> None:
    spec = job(latents, LONG)
    with flow(tmp_path, spec) as process:
        until(lambda: bool(queue()), 0.2)
        os.kill(process.pid, signal.SIGKILL)
    before = queue()
    assert len(before) == 1
    launcher.run(spec, TWO_NODES, progress=Noted(), log=LOG)
    assert f"Slurm job {before[0].split()[0]} for this stage is queued or running; following it" in lines.messages
    assert STAGES["train"].kind.read(spec.output.uri).counts["steps"] == LONG.steps


def test_a_preempted_job_comes_back_and_goes_on(tmp_path: Path, latents: LatentManifest) -> None:
    config: TrainConfig = LONG.model_copy(update={"seed": 1})
    spec = job(latents, config)
    with flow(tmp_path, spec) as process:
        until(lambda: steps(spec) > 0)
        urgent = ["sbatch", "--wait", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 1"]
        subprocess.run(urgent, check=True, capture_output=True)
        assert not (Path(spec.output.uri) / "manifest.json").exists()
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert "resuming after step" in output
    root = latents.root
    again = spec.model_copy(update={"output": STAGES["train"].output(root, config, latents, force=True)})
    launcher.run(again, LocalLaunch(nproc=2), progress=Noted(), log=LOG)
    disturbed, undisturbed = (STAGES["train"].kind.read(one.output.uri).files for one in (spec, again))
    assert disturbed == undisturbed


def test_what_slurm_refuses_is_one_line(latents: LatentManifest) -> None:
    nowhere = TWO_NODES.model_copy(update={"options": {"partition": "nowhere"}})
    with pytest.raises(InputError, match="launch: Slurm refuses the job: .*invalid partition"):
        launcher.run(job(latents, TINY), nowhere, progress=Noted(), log=LOG)
