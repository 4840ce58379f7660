"""Ranks that run a stage and are killed, whose disk fills up, whose batches are spoilt.

They are forked from a process that has imported torch and the product once, so that they start in milliseconds.
This file is also the script of that process, and of the ranks that the real torchrun starts. A rank writes a line
for each progress that it hears of: its number, what is done, and the total.
"""

import itertools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import torch
from torch.distributed import TCPStore
from until import LIMIT, until

from dit import encode, evaluate, sample, train
from dit.encode import EncodeConfig
from dit.evaluate import EvaluateConfig
from dit.export import CheckpointManifest
from dit.sample import SampleManifest
from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from dit.training.data import Batch, Batches
from storage.archives.open import ArchiveRef
from storage.code_version import code_version
from storage.config import Config
from storage.latents import LatentManifest
from storage.manifest import Manifest, StageOutput
from storage.shards import shard
from storage.shards.shard import ShardConfig, ShardManifest
from storage.tracker import NullTracker

STAGES: dict[str, tuple[Any, type[Config], Callable[[str], Any]]] = {
    "shard": (shard.run, ShardConfig, ArchiveRef.model_validate_json),
    "encode": (encode.run, EncodeConfig, ShardManifest.read),
    "train": (train.run, TrainConfig, LatentManifest.read),
    "sample": (sample.run, SampleConfig, CheckpointManifest.read),
    "evaluate": (evaluate.run, EvaluateConfig, SampleManifest.read),
    "measure": (measuring.run, TrainConfig, LatentManifest.read),
}
LATE = ("dit.training.checkpoint", "dit.report.plots", "diffusers.models.autoencoders.autoencoder_kl", "torch._dynamo")
"""What stages, diffusers and torch import when they need it."""


@dataclass(frozen=True)
class Faults:
    """What befalls the ranks. Ranks, attempts and steps of batches count from 0."""

    kills: Sequence[tuple[int, int]] = ()
    """The rank that is killed when so much is done, one for each attempt."""
    restarts: int = 0
    """How often all ranks are started again after one was killed."""
    event: int | None = None
    """The access to the folder of outputs, counted from 1, at which the process is killed."""
    spoilt: Sequence[tuple[int, int]] = ()
    """Ranks and steps whose batch is not finite."""
    full: tuple[int, int] | None = None
    """The rank whose disk is full, and after which step, once a checkpoint is saved."""


class Job(NamedTuple):
    """A stage for so many ranks."""

    out: StageOutput
    config: Config
    source: Manifest | ArchiveRef
    ranks: int = 2
    machine: int | None = None
    """How many ranks believe to share a machine; None is all."""
    faults: Faults = Faults()

    def json(self) -> str:
        values = {"out": self.out.model_dump(mode="json"), "config": self.config.model_dump(mode="json")}
        values["source"] = self.source.uri if isinstance(self.source, Manifest) else self.source.model_dump_json()
        shape = {"ranks": self.ranks, "machine": self.machine or self.ranks}
        return json.dumps(values | shape | {"faults": asdict(self.faults)})


@dataclass(frozen=True)
class Ended:
    """How the ranks of a job ended."""

    codes: list[list[int]]
    """Exit codes of each attempt's ranks, minus the signal for those that were killed."""
    progress: list[list[int]]
    """The rank, what was done and the total of each progress."""
    events: int
    """Accesses to the folder of outputs in the last attempt, if its only rank came to its end."""
    errors: str


class Template:
    """The process that ranks are forked from."""

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self._new_folder = new_folder
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_env(), start_new_session=True
        )

    def run(self, job: Job) -> Ended:
        """Do a job to its end, however it ends."""
        folder = self._folder(job)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], LIMIT)[0], f"no end: {_errors(folder)}"
        line = self._process.stdout.readline()
        assert line, "the template ended; see above"
        return _ended(folder, json.loads(line))

    def finish(self, job: Job) -> Ended:
        """Do a job, in as many attempts as it has restarts and one more, until all ranks are done."""
        ended = self.run(job)
        assert not any(ended.codes[-1]), ended.errors
        assert len(ended.codes) == 1 + job.faults.restarts
        return ended

    def torchrun(self, job: Job) -> Ended:
        """Do a job under the real torchrun."""
        folder = self._folder(job)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"]
        with (folder / "progress").open("w") as progress, (folder / "errors").open("w") as errors:
            command += [__file__, str(folder)]
            done = subprocess.run(command, env=_env(), stdout=progress, stderr=errors, check=False, timeout=LIMIT)
        return _ended(folder, [[done.returncode]])

    def end(self) -> None:
        """End it and all that it has started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _folder(self, job: Job) -> Path:
        folder = self._new_folder()
        (folder / "job.json").write_text(job.json())
        return folder


def _env() -> dict[str, str]:
    path = os.pathsep.join(sys.path)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _ended(folder: Path, codes: list[list[int]]) -> Ended:
    lines = [[int(word) for word in line.split()] for line in (folder / "progress").read_text().splitlines()]
    events = [line[0] for line in lines if len(line) == 1]
    progress = [line for line in lines if len(line) == 3]
    return Ended(codes, progress, sum(events), _errors(folder))


def _errors(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("errors*")))


# In the template and its ranks


class Watcher(NullTracker):
    """Writes down each progress, and lets come what was planned for it."""

    def __init__(self, out: StageOutput, faults: dict[str, Any]) -> None:
        self.out, self.faults, self.rank = out, faults, int(os.environ["RANK"])
        attempt, kills = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), faults["kills"]
        self.killed_at = kills[attempt][1] if attempt < len(kills) and kills[attempt][0] == self.rank else None

    def progress(self, done: int, total: int, unit: str) -> None:
        os.write(1, f"{self.rank} {done} {total}\n".encode())
        if self.killed_at is not None and done >= self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.faults["full"] == [self.rank, done]:
            until(lambda: list(Path(self.out.uri).glob("checkpoints/*/record.json")))
            longest = 1000  # bytes that a file may have from now on
            resource.setrlimit(resource.RLIMIT_FSIZE, (longest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def spoiling(spoilt: list[list[int]]) -> type[Batches]:
    class Spoilt(Batches):
        def __call__(self, step: int) -> Batch:
            batch = super().__call__(step)
            return replace(batch, x0=batch.x0 * float("nan")) if [self.ranks.rank, step] in spoilt else batch

    return Spoilt


def count_events(folder: str, killed_at: int | None) -> "itertools.count[int]":
    """Count what is opened, renamed, made or removed below a folder, and kill this process at such a one."""
    events = itertools.count(1)

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        paths = [argument for argument in arguments[:2] if isinstance(argument, str)]
        mine = name == "open" or name.startswith("os.")
        if mine and any(path.startswith(folder) for path in paths) and next(events) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return events


def rank(job: dict[str, Any]) -> None:
    """Do a rank's part of a job."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(job["machine"])
    train.Batches = spoiling(job["faults"]["spoilt"])  # type: ignore[misc]
    out = StageOutput.model_validate(job["out"])
    run, config, source = STAGES[out.header.stage]
    events = count_events(out.root, job["faults"]["event"])
    tracker = Watcher(out, job["faults"])
    run(config.model_validate(job["config"]), source(job["source"]), out=out, tracker=tracker)
    os.write(1, f"{next(events) - 1}\n".encode())


def fork(work: Callable[[], None]) -> int:
    """The number of a new process that does the work and ends."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        whole = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole, whole))  # a disk that was made full has room for the errors
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def store() -> Iterator[int]:
    """The port of a store in a process of its own, as torchrun has one: its threads are not to be forked."""
    reader, writer = os.pipe()

    def serve() -> None:
        held = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(held.port).encode())
        signal.pause()

    pid = fork(serve)
    yield int(os.read(reader, 9))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)


def attempt(folder: Path, job: dict[str, Any], number: int, port: int) -> list[int]:
    """How the ranks end. When one is killed, all are, as torchrun does it."""

    def work() -> None:
        errors = f"errors-{values['RANK']}"  # a traceback is many writes, which those of others must not part
        for descriptor, name in ((1, "progress"), (2, errors)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
        os.environ.update({name: str(value) for name, value in values.items()})
        rank(job)

    pids = []
    for each in range(job["ranks"]):
        values = {"RANK": each, "LOCAL_RANK": each, "WORLD_SIZE": job["ranks"], "TORCHELASTIC_RESTART_COUNT": number}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        values |= {"TORCHELASTIC_RUN_ID": "forked"}  # by which torch, and we, know torchrun
        pids.append(fork(work))
    codes = dict[int, int]()
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, 0)
        codes[pid] = os.waitstatus_to_exitcode(status)
        for other in set(pids) - set(codes) if codes[pid] < 0 else ():
            os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def attempts(folder: Path) -> Iterator[list[int]]:
    """How the ranks of each attempt end, until none fails or there are enough."""
    job = json.loads((folder / "job.json").read_text())
    (folder / "progress").touch()
    for number in range(1 + job["faults"]["restarts"]):
        with store() as port:
            codes = attempt(folder, job, number, port)
        yield codes
        if not any(codes):
            return


def main() -> None:
    """Serve until stdin ends."""
    for name in LATE:
        import_module(name)
    torch.set_num_threads(1)
    code_version()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(list(attempts(Path(line.strip())))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    rank(json.loads(Path(sys.argv[1], "job.json").read_text())) if sys.argv[1:] else main()
