"""Training as a job of a real Slurm: followed, cancelled, found again, preempted."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from faults import start
from launching import ENDLESS, LOG, TINY, Noted, job
from slurm_cluster import reason_not_to, slurm_cluster
from until import until

from dit.training.config import TrainConfig
from flows.contract import STAGES
from flows.launch import slurm, slurm_queue
from flows.launch import start as launcher
from flows.launch.spec import LocalLaunch, SlurmLaunch, WorkerSpec
from storage.errors import DitflowError, InputError, SubmittedError
from storage.latents import LatentManifest

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(reason_not_to() is not None, reason=str(reason_not_to())),
]
TWO_NODES = SlurmLaunch(kind="slurm", nodes=2, poll_seconds=0.5)
LATER = SlurmLaunch(kind="slurm", wait=False)
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
from flows.launch import slurm
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
    done, total, unit = noted.progress[-1]
    assert (done, total) == (4, 4)
    assert unit.startswith("steps, loss ")
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


def look(spec: WorkerSpec, launch: SlurmLaunch = LATER) -> str:
    """What a flow that does not wait says; empty if the job has made its output."""
    try:
        launcher.run(spec, launch, progress=Noted(), log=LOG)
    except SubmittedError as said:
        return str(said)
    return ""


def test_a_flow_submits_its_job_and_the_next_one_looks(latents: LatentManifest) -> None:
    spec = job(latents, TINY.model_copy(update={"seed": 2}))
    assert look(spec).startswith("train: Slurm job ")
    until(lambda: queue() == [], 0.2)
    assert look(spec) == ""
    assert STAGES["train"].kind.read(spec.output.uri).counts["steps"] == TINY.steps
    assert not (Path(spec.output.uri) / "slurm" / "job.json").exists()


def test_a_flow_that_waits_follows_a_job_that_another_submitted(
    latents: LatentManifest, lines: pytest.LogCaptureFixture
) -> None:
    spec = job(latents, LONG.model_copy(update={"seed": 3}))
    number = look(spec).split()[3]
    launcher.run(spec, TWO_NODES, progress=Noted(), log=LOG)
    assert lines.messages[0].startswith(f"Slurm job {number} for this stage is queued or running")
    assert queue() == []


def test_several_jobs_are_an_array_and_each_is_found(latents: LatentManifest) -> None:
    configs = [ENDLESS, *(TINY.model_copy(update={"seed": seed}) for seed in (5, 6))]
    specs = [job(latents, config) for config in configs]
    with slurm.array(limit=1) as ids:
        for spec in (*specs, specs[0]):  # two recipes may need the same output
            assert look(spec) == "train: submitted to Slurm"
    number = ids[0].partition("_")[0]
    assert ids == [f"{number}_{task}" for task in range(3)]
    until(lambda: " of 1,000,000 steps" in look(specs[0]), 0.2)
    assert look(specs[0]).startswith(f"train: Slurm job {number}_0 is running, ")
    assert f"{number}_[1-2%1] PENDING" in queue()
    assert look(specs[2]).startswith(f"train: Slurm job {number}_2 is pending")
    subprocess.run(["scancel", f"{number}_0"], check=True)
    until(lambda: queue() == [], 0.2)
    assert [look(spec) for spec in specs[1:]] == ["", ""]
    assert all(STAGES["train"].kind.read(spec.output.uri) for spec in specs[1:])
    let_slurm_forget(specs[0])
    with pytest.raises(DitflowError, match="ended as CANCELLED"):
        look(specs[0])


def test_two_sweeps_at_once_submit_a_job_once(latents: LatentManifest) -> None:
    specs = [job(latents, TINY.model_copy(update={"seed": seed})) for seed in (10, 11, 12)]
    with slurm.array() as later:
        said = [look(spec) for spec in specs]
        with slurm.array() as sooner:
            said += [look(spec) for spec in specs[:2]]
    assert said == ["train: submitted to Slurm"] * 5
    assert [len(sooner), len(later)] == [2, 1]
    until(lambda: queue() == [], 0.2)
    assert [look(spec) for spec in specs] == ["", "", ""]


def let_slurm_forget(spec: WorkerSpec) -> None:
    """Note another job for an output, one that Slurm does not know, as it does not some minutes after the end."""
    noted = slurm_queue.note(spec.output.uri)
    assert noted is not None
    note = Path(spec.output.uri) / slurm_queue.FOLDER / slurm_queue.NOTE
    note.write_text(noted.model_copy(update={"job": "1"}).model_dump_json())


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_has_ended_a_job_is_told_at_the_next_look_and_then_it_is_submitted_again(
    latents: LatentManifest, forgotten: bool
) -> None:
    spec = job(latents, ENDLESS.model_copy(update={"seed": 7}))
    number = look(spec).split()[3]
    until(lambda: " of 1,000,000 steps" in look(spec), 0.2)
    assert look(spec).startswith(f"train: Slurm job {number} is running, ")
    subprocess.run(["scancel", number], check=True)
    until(lambda: queue() == [], 0.2)
    if forgotten:
        let_slurm_forget(spec)
    with pytest.raises(DitflowError, match=f"Slurm job {1 if forgotten else number} ended as CANCELLED"):
        look(spec)
    again = look(spec).split()[3]
    assert again != number
    subprocess.run(["scancel", again], check=True)
    until(lambda: queue() == [], 0.2)


def test_a_job_that_was_cancelled_before_it_started_is_told_when_slurm_has_forgotten_it(
    latents: LatentManifest,
) -> None:
    spec = job(latents, TINY.model_copy(update={"seed": 9}))
    number = look(spec, LATER.model_copy(update={"options": {"begin": "now+1hour"}})).split()[3]
    subprocess.run(["scancel", number], check=True)
    until(lambda: queue() == [], 0.2)
    let_slurm_forget(spec)
    with pytest.raises(DitflowError, match="ended without a word"):
        look(spec)


def test_a_job_whose_rank_was_killed_is_submitted_again_as_often_as_the_launch_says(latents: LatentManifest) -> None:
    spec, once = job(latents, ENDLESS.model_copy(update={"seed": 8})), LATER.model_copy(update={"max_restarts": 1})
    for look_again in (True, False):
        assert "submitted" in look(spec, once)
        until(lambda: bool(ranks(spec)), 0.2)
        for rank in ranks(spec):
            rank.kill()
        until(lambda: queue() == [], 0.2)
        if not look_again:
            with pytest.raises(DitflowError, match=r"killed by SIGKILL.*max_restarts \(1\) is used up"):
                look(spec, once)


def ranks(spec: WorkerSpec) -> list[psutil.Process]:
    return [each for each in psutil.process_iter() if is_rank(each, spec)]


def is_rank(process: psutil.Process, spec: WorkerSpec) -> bool:
    """Whether it is a rank of a stage's job, and neither its torchrun nor a rank of another test's cluster."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return line[-1:] == [f"{spec.output.uri}/slurm/spec.json"] and "torch.distributed.run" not in line
