"""A stage as a Slurm job: submit it, follow its log, and cancel it when the flow is cancelled.

The job has the name of its output, or is noted beside it. It goes on when its flow is killed, and the next flow for the
same output finds it and follows it instead of submitting another. A job that reached its time limit, was preempted, or
lost a rank or a node is replaced by a new one, ``max_restarts`` times at most.

With ``wait: false`` nobody follows: the flow submits the job and ends, and the next one for the same output looks how
far it is. What several recipes submit within `array` is one array of jobs.
"""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flows.launch.rank_log import Logger, LostRankError, Progress, RankLog, WorkerError
from flows.launch.slurm_queue import (
    ACTIVE_STATES,
    FOLDER,
    Job,
    Note,
    ask,
    find,
    forget,
    new_lines,
    note,
    state_of,
    submit,
)
from flows.launch.spec import SlurmLaunch, WorkerSpec
from storage import uri
from storage.errors import DitflowError, InputError, PreemptedError, SubmittedError
from storage.manifest import is_finished
from storage.rows.cache import making

RESUBMIT_STATES = {"TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
"""The job has ended, and a new one resumes from the last checkpoint."""
_CANCELLED = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ \*\*\*")
"""What Slurm says in a job's log of a person's scancel; of all else it says what that is due to."""


def run(spec: WorkerSpec, launch: SlurmLaunch, *, progress: Progress, log: Logger) -> None:
    """Follow the stage's job to its end; submit one if none is queued or running.

    When the caller is cancelled the job is cancelled; when it is killed the job goes on.

    Raises:
        InputError: Slurm is not installed here, it refuses the job, or a rank found the user's input wrong.
        WorkerError: a rank failed, or ``max_restarts`` is used up.
        SubmittedError: the job is queued or running, and the launch does not wait.
        DitflowError: the job was cancelled, or Slurm does not answer.
    """
    folder = _folder(spec, launch)
    if not launch.wait:
        return _look(spec, launch, folder)
    for attempt in range(launch.max_restarts + 1):
        found = find(spec.output.uri, spec.job_name)
        if found is None:
            (job,) = submit([Job(spec, folder, attempt)], launch)
            log.info(f"Slurm job {job} submitted; its log is {folder / 'job.log'}")
        else:
            job, _ = found
            log.info(f"Slurm job {job} for this stage is queued or running; following it")
        state, ranks = _follow(job, spec.output.uri, folder, launch.poll_seconds, progress, log)
        if state == "COMPLETED":
            return None
        error = _error(job, state, ranks)
        if not _resumes(state, error):
            raise error
        log.info(f"{error}; resuming from the last checkpoint")
    raise _used_up(error, launch, folder)


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


@dataclass
class _Array:
    """Jobs to submit together: those of each launch, by the names of their outputs."""

    limit: int | None
    jobs: dict[str, dict[str, Job]] = field(default_factory=dict)
    launches: dict[str, SlurmLaunch] = field(default_factory=dict)

    def add(self, job: Job, launch: SlurmLaunch) -> None:
        key = launch.model_dump_json()
        self.launches[key] = launch
        self.jobs.setdefault(key, {})[job.spec.job_name] = job


_arrays: list[_Array] = []


@contextmanager
def array(limit: int | None = None) -> Iterator[list[str]]:
    """Submit what launches that do not wait would submit in the block at its end, all at once.

    What another command has submitted meanwhile is left out.

    Args:
        limit: how many of the jobs run at once; None for as many as there is room for.

    Yields:
        The ids of the jobs, when the block has ended.

    Raises:
        InputError: Slurm refuses.
    """
    ids: list[str] = []
    _arrays.append(_Array(limit))
    try:
        yield ids
    finally:
        together = _arrays.pop()
    with ExitStack() as locks:  # another command may have looked at the same time
        for output in sorted({job.spec.output.uri for jobs in together.jobs.values() for job in jobs.values()}):
            locks.enter_context(making(output))
        for key, jobs in together.jobs.items():
            if left := [job for job in jobs.values() if note(job.output) is None]:
                ids += submit(left, together.launches[key], limit)


def _folder(spec: WorkerSpec, launch: SlurmLaunch) -> Path:
    given = check(launch, spec.output.uri).absolute()
    folder = given / FOLDER / spec.output.header.folder_name if launch.folder else given / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _look(spec: WorkerSpec, launch: SlurmLaunch, folder: Path) -> None:
    """Return if the job has made its output; submit one if there is none."""
    found, noted, attempt = find(spec.output.uri, spec.job_name), note(spec.output.uri), 0
    if found is not None:
        job, state = found
        raise SubmittedError(f"{spec.stage}: Slurm job {job} is {state.lower()}{_how_far(folder, noted)}")
    if noted is not None:
        forget(spec.output.uri)
        if is_finished(spec.output.uri):
            return
        attempt = _next_attempt(noted, launch, folder)
    made = Job(spec, folder, attempt)
    if _arrays:
        _arrays[-1].add(made, launch)
        raise SubmittedError(f"{spec.stage}: submitted to Slurm")
    (job,) = submit([made], launch)
    raise SubmittedError(f"{spec.stage}: Slurm job {job} submitted; its log is {made.log}")


def _next_attempt(noted: Note, launch: SlurmLaunch, folder: Path) -> int:
    """The number of the job that resumes one that has ended without its output; raises if none shall."""
    ranks = RankLog(lambda *_: None, lambda _: None)
    lines, _ = new_lines(folder / "job.log", noted.begin, last=True)
    ranks.read(lines)
    job, state = noted.job or noted.name, state_of(noted.job) if noted.job else "COMPLETED"
    if state == "COMPLETED":  # without an output; or Slurm has forgotten it, as it does after minutes
        said = lines if noted.said is None else new_lines(noted.said, 0, last=True)[0]
        if noted.job and not lines and not said:
            raise DitflowError(f"Slurm job {job} ended without a word; it may have been cancelled before it started")
        state = "CANCELLED" if any(map(_CANCELLED.search, said)) else "FAILED"
    error = _error(job, state, ranks)
    if not _resumes(state, error):
        raise error
    if noted.attempt >= launch.max_restarts:
        raise _used_up(error, launch, folder)
    return noted.attempt + 1


def _how_far(folder: Path, noted: Note | None) -> str:
    done: list[str] = []
    lines, _ = new_lines(folder / "job.log", noted.begin if noted else 0, last=False)
    RankLog(lambda *told: done.append("{:,} of {:,} {}".format(*told)), lambda _: None).read(lines)
    return f", {done[-1]}" if done else ""


def _error(job: str, state: str, ranks: RankLog) -> DitflowError:
    return ranks.failure(1) if state == "FAILED" else DitflowError(f"Slurm job {job} ended as {state}")


def _resumes(state: str, error: DitflowError) -> bool:
    return state in RESUBMIT_STATES or isinstance(error, LostRankError | PreemptedError)


def _used_up(error: DitflowError, launch: SlurmLaunch, folder: Path) -> WorkerError:
    return WorkerError(f"{error}; launch.max_restarts ({launch.max_restarts}) is used up; see {folder / 'job.log'}")


def _follow(
    job: str,
    output: str,
    folder: Path,
    seconds: float,
    progress: Progress,
    log: Logger,
) -> tuple[str, RankLog]:
    """Log a job's new output until it ends, one log record for each poll; return the state that it ended in."""
    path, said = folder / "job.log", list[str]()
    ranks, offset = RankLog(progress, said.append), path.stat().st_size if path.exists() else 0
    try:
        while True:
            state = state_of(job)
            lines, offset = new_lines(path, offset, last=state not in ACTIVE_STATES)
            ranks.read(lines)
            if said:
                log.info("\n".join(said))
                said.clear()
            if state not in ACTIVE_STATES:
                forget(output)
                return state, ranks
            time.sleep(seconds)
    except BaseException:
        ask("scancel", job)
        forget(output)
        raise
