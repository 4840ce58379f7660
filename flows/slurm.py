"""A stage as a Slurm job: submitted once, followed by whoever asks for it, and cancelled with its flow.

The job outlives the flow that submitted it when that is killed: the next one finds it by its name, which is
that of the output, and follows it to its end.
"""

import logging
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from flows.rank_log import LostRankError, Progress, RankLog, WorkerError
from flows.worker import WorkerSpec
from storage import uri
from storage.config import Config
from storage.errors import DitflowError, InputError, PreemptedError

LOGGER = logging.getLogger(__name__)
WAITS = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "RESIZING", "SIGNALING"}
AGAIN = {"TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
"""Ends after which a new job goes on from the last checkpoint."""

SCRIPT = """\
#!/bin/bash
{options}
{setup}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$head" --oneliner | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
exec srun --kill-on-bad-exit=1 {python} -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" \\
    --nproc-per-node={nproc} --rdzv-backend=c10d --rdzv-endpoint="$address:$((20000 + SLURM_JOB_ID % 20000))" \\
    --rdzv-id="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" -m flows.worker {spec}
"""


class SlurmLaunch(Config):
    """Ranks on the nodes of a Slurm cluster, which runs this same Python and sees the same files."""

    kind: Literal["slurm"]
    """Where ranks run."""
    nodes: int = Field(1, ge=1)
    """Nodes of the job."""
    nproc: int = Field(1, ge=1)
    """Ranks on each node: one a GPU, or on CPU any number."""
    options: dict[str, str | int] = Field(default_factory=dict)
    """Further options of sbatch by their long names, such as partition, time, gpus-per-node."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the ranks start, such as ``module load cuda``."""
    folder: str | None = None
    """Where script and log go, a folder that all nodes see; by default the output's own, if it is a local path."""
    max_restarts: int = Field(10, ge=0)
    """How often a job that ran out of time, was preempted, or lost a rank or a node is followed by another."""
    poll_seconds: float = Field(5.0, gt=0)
    """Time between two looks at the job."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.nproc

    @field_validator("options")
    @classmethod
    def _one_line_each(cls, options: dict[str, str | int]) -> dict[str, str | int]:
        for key, value in options.items():
            if not key.replace("-", "").isalnum() or "\n" in str(value):
                raise ValueError(f"{key}: not an option of sbatch by its long name, with a value of one line")
        return options


def run(
    spec: WorkerSpec,
    launch: SlurmLaunch,
    *,
    progress: Progress,
    log: "logging.Logger | logging.LoggerAdapter[logging.Logger]",
) -> None:
    """Bring a stage to its end on the cluster: by a job that is there already, or by a new one.

    When the caller is cancelled the job is cancelled; when it is killed the job goes on.

    Raises:
        InputError: there is no Slurm here, it refuses the job, or a rank found the user's input wrong.
        WorkerError: a rank failed.
        DitflowError: the job was cancelled, or ended too often before its time.
    """
    folder, name = _folder(spec, launch), f"ditflow-{spec.stage}-{spec.output.header.digest[:16]}"
    for _ in range(launch.max_restarts + 1):
        job = _find(name)
        if job is None:
            job = _submit(spec, launch, folder, name)
            log.info(f"Slurm job {job} submitted; its log is {folder / 'job.log'}")
        else:
            log.info(f"Slurm job {job} is at it already; following it")
        state, ranks = _follow(job, folder / "job.log", launch.poll_seconds, progress, log)
        if state == "COMPLETED":
            return
        error = ranks.failure(1) if state == "FAILED" else DitflowError(f"Slurm job {job} ended as {state}")
        if state not in AGAIN and not isinstance(error, LostRankError | PreemptedError):
            raise error
        log.info(f"{error}; going on from the last checkpoint")
    raise WorkerError(f"{error}, as {launch.max_restarts} jobs before it; see {folder / 'job.log'}")


def _folder(spec: WorkerSpec, launch: SlurmLaunch) -> Path:
    if shutil.which("sbatch") is None:
        raise InputError("launch: no Slurm here (no sbatch on the path); start the flow where jobs can be submitted")
    given = uri.local_path(launch.folder) if launch.folder else uri.local_path(spec.output.uri)
    if given is None:
        raise InputError("launch.folder: name a folder that all nodes see, for the job's script and log")
    folder = given.absolute() / "slurm" / spec.output.header.digest[:16] if launch.folder else given / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _submit(spec: WorkerSpec, launch: SlurmLaunch, folder: Path, name: str) -> str:
    script, values = folder / "job.sh", folder / "spec.json"
    values.write_text(spec.model_dump_json())
    options: dict[str, str | int] = {
        "nodes": launch.nodes,
        "signal": "TERM@120",  # before time is up: ranks save and go
        **launch.options,
        "ntasks-per-node": 1,
        "job-name": name,
        "output": str(folder / "job.log"),
        "open-mode": "append",
    }
    lines = ["#SBATCH --requeue", *(f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items())]
    text = SCRIPT.format(
        options="\n".join(lines),
        setup="\n".join(launch.setup),
        python=shlex.quote(sys.executable),
        nproc=launch.nproc,
        spec=shlex.quote(str(values)),
    )
    script.write_text(text)
    done = _slurm("sbatch", "--parsable", str(script))
    if done.returncode:
        raise InputError(f"launch: Slurm refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def _find(name: str) -> str | None:
    """The job of that name that waits or runs, if there is one."""
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
    log: "logging.Logger | logging.LoggerAdapter[logging.Logger]",
) -> tuple[str, RankLog]:
    """Log what a job says until it ends, one record a look; return the state it ended in."""
    said: list[str] = []
    ranks, place = RankLog(progress, said.append), path.stat().st_size if path.exists() else 0
    try:
        while True:
            state = _state(job)
            lines, place = _new_lines(path, place, last=state not in WAITS)
            ranks.take(lines)
            if said:
                log.info("\n".join(said))
                said.clear()
            if state not in WAITS:
                return state, ranks
            time.sleep(seconds)
    except BaseException:
        _slurm("scancel", job)
        raise


def _state(job: str) -> str:
    """The state of a job. A controller that is away is waited for: the job does not need it."""
    done = _slurm("scontrol", "show", "job", job, "--oneliner")
    for word in done.stdout.split():
        if word.startswith("JobState="):
            return word.removeprefix("JobState=")
    if "Invalid job id" in done.stderr:  # ended minutes ago, while nobody looked: its output tells how
        return "COMPLETED"
    LOGGER.warning("Slurm does not answer: %s", " ".join(done.stderr.split()))
    return "PENDING"


def _new_lines(path: Path, place: int, *, last: bool) -> tuple[list[str], int]:
    """The whole lines of a file behind a place, at its end also one that is not whole, and the place behind them."""
    if not path.exists():
        return [], place
    with path.open("rb") as file:
        file.seek(place)
        data = file.read()
    whole = data if last else data[: data.rfind(b"\n") + 1]
    return whole.decode(errors="replace").splitlines(), place + len(whole)


def _slurm(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
