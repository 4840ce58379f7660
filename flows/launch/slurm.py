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

from flows.launch.rank_log import LostRankError, Progress, RankLog, WorkerError
from flows.launch.spec import SlurmLaunch, WorkerSpec
from storage import uri
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
    --rdzv-id="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" -m flows.launch.worker {spec}
"""


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
    folder, name = _folder(spec, launch), f"ditflow-{spec.output.name}"
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
    folder = given.absolute() / "slurm" / spec.output.header.folder_name if launch.folder else given / "slurm"
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
