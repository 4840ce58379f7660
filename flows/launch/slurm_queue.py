"""Slurm's queue: submit jobs, one or an array of them, note them beside the output, and find them again."""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from flows import temporary
from flows.launch import torchrun
from flows.launch.spec import SlurmLaunch, WorkerSpec
from storage import uri
from storage.errors import DitflowError, InputError
from storage.verify import JOBS

LOGGER = logging.getLogger(__name__)
PREFECT_KEYS = ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY")
FOLDER = JOBS
"""Below an output: what was submitted for it, with script and log. These may also lie below `launch.folder`."""
NOTE = "job.json"
"""Below an output, in `FOLDER`: the `Note` of its job. A store may hold it that the nodes do not see."""
ACTIVE_STATES = frozenset(
    ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "RESIZING", "SIGNALING"]
)
"""The job has not ended."""

SCRIPT = """\
#!/bin/bash
{options}
{setup}
export {env}
folders=({folders})
folder="${{folders[${{SLURM_ARRAY_TASK_ID:-0}}]}}"
exec >>"$folder/job.log" 2>&1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$head" --oneliner | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
exec srun --kill-on-bad-exit=1 {command}
"""
# Shell expressions: the port differs between jobs, the id also between requeues of one job.
ENDPOINT, JOB_ID = '"$address:$((20000 + SLURM_JOB_ID % 20000))"', '"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"'


class Note(BaseModel):
    """What was submitted for an output, kept below it: so also ``ditflow gc`` sees that it is worked on."""

    name: str
    """Name of the job in Slurm."""
    task: int | None
    """Its number in an array."""
    begin: int
    """Where its output begins in the log."""
    attempt: int
    """How many jobs were submitted before it."""
    job: str | None = None
    """Its id; none if the command was killed before Slurm had answered."""
    said: Path | None = None
    """The file in which Slurm itself speaks of an array's task; None: in the log."""


@dataclass(frozen=True)
class Job:
    """A stage to submit."""

    spec: WorkerSpec
    folder: Path
    """Folder of its script, spec and log."""
    attempt: int = 0

    @property
    def output(self) -> str:
        """URL of what it makes."""
        return self.spec.output.uri

    @property
    def log(self) -> Path:
        """The file with the output of its ranks."""
        return self.folder / "job.log"


def submit(jobs: Sequence[Job], launch: SlurmLaunch, limit: int | None = None) -> list[str]:
    """Submit jobs, several of them as one array, and note each beside its output; return their ids.

    Args:
        jobs: what to run.
        launch: how.
        limit: how many tasks of an array run at once; None for all.

    Raises:
        InputError: Slurm refuses.
    """
    array = len(jobs) > 1
    name = f"ditflow-array-{uuid4().hex[:8]}" if array else jobs[0].spec.job_name
    notes = [
        Note(
            name=name,
            task=task if array else None,
            begin=_size(job.log),
            attempt=job.attempt,
            said=jobs[0].folder / f"{name}-{task}.log" if array else None,
        )
        for task, job in enumerate(jobs)
    ]
    for job, note in zip(jobs, notes, strict=True):
        (job.folder / "spec.json").write_text(job.spec.model_dump_json(), "utf-8")
        _write(job.output, note)  # before Slurm has it: a kill loses no job
    script = jobs[0].folder / ("array.sh" if array else "job.sh")
    script.write_text(_script(jobs, launch, name, limit), "utf-8")
    done = ask("sbatch", "--parsable", str(script))
    if done.returncode:
        for job in jobs:
            forget(job.output)
        raise InputError(f"launch: Slurm refuses the job: {' '.join(done.stderr.split())}")
    number = done.stdout.strip().partition(";")[0]
    ids = [f"{number}_{task}" for task in range(len(jobs))] if array else [number]
    for job, note, job_id in zip(jobs, notes, ids, strict=True):
        _write(job.output, note.model_copy(update={"job": job_id}))
    return ids


def find(output: str, name: str) -> tuple[str, str] | None:
    """The id and the state of the queued or running job of an output, if there is one.

    Args:
        output: its URL.
        name: of a job that is not noted.

    Raises:
        DitflowError: Slurm does not answer.
    """
    noted = note(output)
    asked = noted.name if noted else name
    done = ask("squeue", "--me", "--noheader", "--array", "--format=%i %T", f"--name={asked}")
    if done.returncode:
        raise DitflowError(f"Slurm does not answer: {' '.join(done.stderr.split())}")
    end = f"_{noted.task}" if noted and noted.task is not None else ""
    jobs = [line.split() for line in done.stdout.splitlines()]
    found = [(number, state) for number, state in jobs if number.endswith(end)]
    return found[-1] if found else None


def state_of(job: str) -> str:
    """The state of a job; ``PENDING`` while the controller does not answer, because jobs go on without it."""
    done = ask("scontrol", "show", "job", job, "--oneliner")
    for word in done.stdout.split():
        if word.startswith("JobState="):
            return word.removeprefix("JobState=")
    if "Invalid job id" in done.stderr:  # Slurm has forgotten it; without a manifest the stage fails later
        return "COMPLETED"
    LOGGER.warning("Slurm does not answer: %s", " ".join(done.stderr.split()))
    return "PENDING"


def new_lines(path: Path, offset: int, *, last: bool) -> tuple[list[str], int]:
    """The complete lines of a file from an offset on, and the offset after them; with ``last`` also a partial line."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data if last else data[: data.rfind(b"\n") + 1]
    return complete.decode(errors="replace").splitlines(), offset + len(complete)


def note(output: str) -> Note | None:
    """What was submitted for an output last, as far as somebody has noted it.

    Raises:
        StorageError: the store does not answer.
    """
    try:
        return Note.model_validate_json(uri.read_if_there(uri.join(output, FOLDER, NOTE)) or b"")
    except ValidationError:  # nothing was
        return None


def forget(output: str) -> None:
    """Remove the note of a job that has ended.

    Raises:
        StorageError: the store refuses.
    """
    uri.remove_tree(uri.join(output, FOLDER, NOTE), output)


def ask(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of Slurm."""
    # Slurm keeps the environment of a job, and ranks do not need what lets one into Prefect's server.
    env = {name: value for name, value in os.environ.items() if name not in PREFECT_KEYS}
    env["TMPDIR"] = temporary.outside()
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=env)


def _script(jobs: Sequence[Job], launch: SlurmLaunch, name: str, limit: int | None) -> str:
    options: dict[str, str | int] = {
        "nodes": launch.nodes,
        "signal": "TERM@120",  # 120 s before the time limit, to save a checkpoint
        **launch.options,
        "ntasks-per-node": 1,
        "job-name": name,
        "output": _pattern(jobs, name),
        "open-mode": "append",
    }
    if len(jobs) > 1:
        options["array"] = f"0-{len(jobs) - 1}" + (f"%{limit}" if limit else "")
    lines = ["#SBATCH --requeue", *(f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items())]
    return SCRIPT.format(
        options="\n".join(lines),
        setup="\n".join(launch.setup),
        env=" ".join(f"{key}={value}" for key, value in torchrun.ENV.items()),
        folders=" ".join(shlex.quote(str(job.folder)) for job in jobs),
        command=" ".join(_command(launch)),
    )


def _pattern(jobs: Sequence[Job], name: str) -> str:
    """The file for what Slurm itself says of a job, and for what comes before the ranks."""
    log = jobs[0].log if len(jobs) == 1 else jobs[0].folder / name
    plain = str(log).replace("%", "%%")  # Slurm fills in what stands behind a single one
    return plain if len(jobs) == 1 else f"{plain}-%a.log"


def _command(launch: SlurmLaunch) -> Iterable[str]:
    """The torchrun command, quoted for the script."""
    python, nodes = shlex.quote(sys.executable), '"$SLURM_JOB_NUM_NODES"'
    options = torchrun.rendezvous(ENDPOINT, JOB_ID)
    return torchrun.command(python, options, nodes, launch.nproc, '"$folder/spec.json"')


def _write(output: str, noted: Note) -> None:
    uri.write(uri.join(output, FOLDER, NOTE), noted.model_dump_json().encode())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
