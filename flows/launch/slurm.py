"""A stage as a Slurm job: submit it, follow its log, and cancel it when the flow is cancelled.

The job has the name of its output. It goes on when its flow is killed, and the next flow for the same output finds it
by that name and follows it instead of submitting another. A job that reached its time limit, was preempted, or lost a
rank or a node is replaced by a new one, ``max_restarts`` times at most.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from flows import temporary
from flows.launch import torchrun
from flows.launch.rank_log import Logger, LostRankError, Progress, RankLog, WorkerError
from flows.launch.spec import SlurmLaunch, WorkerSpec
from storage import uri
from storage.errors import DitflowError, InputError, PreemptedError

LOGGER = logging.getLogger(__name__)
ACTIVE_STATES = frozenset(
    ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "RESIZING", "SIGNALING"]
)
"""The job has not ended."""
RESUBMIT_STATES = {"TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
"""The job has ended, and a new one resumes from the last checkpoint."""

SCRIPT = """\
#!/bin/bash
{options}
{setup}
export {env}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$head" --oneliner | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
exec srun --kill-on-bad-exit=1 {command}
"""
# Shell expressions: the port differs between jobs, the id also between requeues of one job.
ENDPOINT, JOB_ID = '"$address:$((20000 + SLURM_JOB_ID % 20000))"', '"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"'


def run(spec: WorkerSpec, launch: SlurmLaunch, *, progress: Progress, log: Logger) -> None:
    """Follow the stage's job to its end; submit one if none is queued or running.

    When the caller is cancelled the job is cancelled; when it is killed the job goes on.

    Raises:
        InputError: Slurm is not installed here, it refuses the job, or a rank found the user's input wrong.
        WorkerError: a rank failed, or ``max_restarts`` is used up.
        DitflowError: the job was cancelled, or Slurm does not answer.
    """
    folder, name = _folder(spec, launch), spec.job_name
    for _ in range(launch.max_restarts + 1):
        job = _find(name)
        if job is None:
            job = _submit(spec, launch, folder, name)
            log.info(f"Slurm job {job} submitted; its log is {folder / 'job.log'}")
        else:
            log.info(f"Slurm job {job} for this stage is queued or running; following it")
        state, ranks = _follow(job, folder / "job.log", launch.poll_seconds, progress, log)
        if state == "COMPLETED":
            return
        error = ranks.failure(1) if state == "FAILED" else DitflowError(f"Slurm job {job} ended as {state}")
        if state not in RESUBMIT_STATES and not isinstance(error, LostRankError | PreemptedError):
            raise error
        log.info(f"{error}; resuming from the last checkpoint")
    raise WorkerError(f"{error}; launch.max_restarts ({launch.max_restarts}) is used up; see {folder / 'job.log'}")


def check(launch: SlurmLaunch, output: str) -> Path:
    """Check that jobs can be submitted from here; return the local folder for scripts and logs.

    Args:
        launch: how they are submitted.
        output: URL of the stage's output, or of a folder above it.

    Raises:
        InputError: Slurm is not installed here, or there is no such folder.
    """
    if shutil.which("sbatch") is None:
        raise InputError("launch: no sbatch on the path; start the flow on a machine that can submit Slurm jobs")
    given = uri.local_path(launch.folder) if launch.folder else uri.local_path(output)
    if given is None:
        raise InputError("launch.folder: the output is remote; name a folder on all nodes for the job's script and log")
    return given


def _folder(spec: WorkerSpec, launch: SlurmLaunch) -> Path:
    given = check(launch, spec.output.uri)
    folder = given.absolute() / "slurm" / spec.output.header.folder_name if launch.folder else given / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _submit(spec: WorkerSpec, launch: SlurmLaunch, folder: Path, name: str) -> str:
    script, values = folder / "job.sh", folder / "spec.json"
    values.write_text(spec.model_dump_json(), "utf-8")
    options: dict[str, str | int] = {
        "nodes": launch.nodes,
        "signal": "TERM@120",  # 120 s before the time limit, to save a checkpoint
        **launch.options,
        "ntasks-per-node": 1,
        "job-name": name,
        "output": str(folder / "job.log").replace("%", "%%"),  # Slurm fills in what stands behind a single one
        "open-mode": "append",
    }
    lines = ["#SBATCH --requeue", *(f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items())]
    text = SCRIPT.format(
        options="\n".join(lines),
        setup="\n".join(launch.setup),
        env=" ".join(f"{name}={value}" for name, value in torchrun.ENV.items()),
        command=" ".join(_command(launch, values)),
    )
    script.write_text(text, "utf-8")
    done = _slurm("sbatch", "--parsable", str(script))
    if done.returncode:
        raise InputError(f"launch: Slurm refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def _command(launch: SlurmLaunch, spec: Path) -> list[str]:
    """The torchrun command, quoted for the script."""
    python, nodes = shlex.quote(sys.executable), '"$SLURM_JOB_NUM_NODES"'
    options = torchrun.rendezvous(ENDPOINT, JOB_ID)
    return torchrun.command(python, options, nodes, launch.nproc, shlex.quote(str(spec)))


def _find(name: str) -> str | None:
    """The id of the queued or running job of that name, if there is one."""
    done = _slurm("squeue", "--me", "--noheader", "--format=%i", f"--name={name}")
    if done.returncode:
        raise DitflowError(f"Slurm does not answer: {' '.join(done.stderr.split())}")
    jobs = done.stdout.split()
    return jobs[-1] if jobs else None


def _follow(
    job: str,
    path: Path,
    seconds: float,
    progress: Progress,
    log: Logger,
) -> tuple[str, RankLog]:
    """Log a job's new output until it ends, one log record for each poll; return the state that it ended in."""
    output: list[str] = []
    ranks, offset = RankLog(progress, output.append), path.stat().st_size if path.exists() else 0
    try:
        while True:
            state = _state(job)
            lines, offset = _new_lines(path, offset, last=state not in ACTIVE_STATES)
            ranks.read(lines)
            if output:
                log.info("\n".join(output))
                output.clear()
            if state not in ACTIVE_STATES:
                return state, ranks
            time.sleep(seconds)
    except BaseException:
        _slurm("scancel", job)
        raise


def _state(job: str) -> str:
    """The state of a job; ``PENDING`` while the controller does not answer, because jobs go on without it."""
    done = _slurm("scontrol", "show", "job", job, "--oneliner")
    for word in done.stdout.split():
        if word.startswith("JobState="):
            return word.removeprefix("JobState=")
    if "Invalid job id" in done.stderr:  # Slurm has forgotten it; without a manifest the stage fails later
        return "COMPLETED"
    LOGGER.warning("Slurm does not answer: %s", " ".join(done.stderr.split()))
    return "PENDING"


def _new_lines(path: Path, offset: int, *, last: bool) -> tuple[list[str], int]:
    """The complete lines of a file from an offset on, and the offset after them; with ``last`` also a partial line."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data if last else data[: data.rfind(b"\n") + 1]
    return complete.decode(errors="replace").splitlines(), offset + len(complete)


def _slurm(*command: str) -> "subprocess.CompletedProcess[str]":
    # Slurm keeps the environment of a job, and ranks do not need the password of Prefect's server.
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_AUTH_STRING"}
    env["TMPDIR"] = temporary.outside()
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=env)
