"""Shards as Prefect tasks: the same bytes on every runner, and one line when something is wrong."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from faults import all_gone, descendants, gone, start
from machine import give_cores
from PIL import Image
from prefect import flow
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner
from until import until

from flows.shard_tasks import TaskError, _task_runner, build_shards, distribute
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef
from storage.errors import InputError, StorageError
from storage.manifest import stage_output
from storage.shards import shard
from storage.shards.runners import Cluster, Local, Runner
from storage.shards.shard import Build, BuildResult, ShardConfig, ShardManifest
from storage.tracker import NullTracker
from storage.verify import faults

IMAGES, PER_SHARD = 48, 4
pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> ArchiveRef:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return ArchiveRef(train=str(folder))


def bare(root: Path, archive: ArchiveRef, runner: Runner, **options: object) -> ShardManifest:
    config = ShardConfig(images_per_shard=PER_SHARD, runner=runner)
    inputs = input_digests(archive)
    out = stage_output(str(root), shard.STAGE, shard.VERSION, config, parents={}, inputs=inputs)
    return shard.run(config, archive, out=out, tracker=NullTracker(), **options)  # type: ignore[arg-type]


@flow
def sharding(root: Path, archive: ArchiveRef, runner: Runner) -> ShardManifest:
    return bare(root, archive, runner, distribute=distribute(runner))


@pytest.fixture
def dask_cluster() -> Iterator[str]:
    """The address of a scheduler with two workers, each a process."""
    pytest.importorskip("distributed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    port = address.rpartition(":")[2]
    python = [sys.executable, "-m", "distributed.cli."]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    scheduler = ["dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    worker = ["dask_worker", address, "--nthreads", "1", "--no-dashboard", "--nworkers", "1"]
    commands = [[*python[:2], f"{python[2]}{name}", *rest] for name, *rest in (scheduler, worker, worker)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(command, env=env, **quiet) for command in commands]  # type: ignore[call-overload]
    yield address
    for process in reversed(processes):
        process.terminate()
        process.wait(180)


@pytest.mark.parametrize(
    "runner", [Local(count=2), Local(), Local(kind="processes", count=2)], ids=["two", "threads", "processes"]
)
def test_every_runner_makes_the_same_bytes(tmp_path: Path, archive: ArchiveRef, runner: Runner) -> None:
    assert_same(tmp_path, archive, runner)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_without_a_number_there_is_a_worker_for_each_core_that_may_be_used(
    kind: Literal["threads", "processes"], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_cores(monkeypatch, 3)
    runner = _task_runner(Local(kind=kind))
    assert isinstance(runner, ThreadPoolTaskRunner | ProcessPoolTaskRunner)
    assert runner._max_workers == 3


@pytest.mark.full
def test_a_dask_cluster_of_processes_makes_the_same_bytes(
    tmp_path: Path, archive: ArchiveRef, dask_cluster: str
) -> None:
    pytest.importorskip("prefect_dask")
    assert_same(tmp_path, archive, Cluster(address=dask_cluster))


@pytest.mark.full
def test_a_dask_cluster_of_the_runs_own(tmp_path: Path, archive: ArchiveRef) -> None:
    pytest.importorskip("prefect_dask")
    assert_same(tmp_path, archive, Cluster())


def assert_same(tmp_path: Path, archive: ArchiveRef, runner: Runner) -> None:
    expected = bare(tmp_path / "bare", archive, Local(count=1))
    made = sharding(tmp_path / "tasks", archive, runner)
    assert made.digest == expected.digest
    assert made.files == expected.files
    assert not faults(made, full=True)


class Once:
    """Fails the first time that a group is built, wherever that is."""

    def __init__(self, folder: Path, error: Exception) -> None:
        self.folder, self.error = folder, error

    def __call__(self, numbers: range) -> BuildResult:
        tries = self.folder / str(numbers.start)
        tries.open("a").write("x")
        if len(tries.read_text()) == 1:
            raise self.error
        return BuildResult(images=len(numbers), unreadable=())


@flow
def building(build: Build, runner: Runner) -> list[BuildResult]:
    return list(distribute(runner)(build, [range(2), range(2, 3)]))


def tries(folder: Path) -> dict[str, int]:
    return {path.name: len(path.read_text()) for path in folder.iterdir()}


def test_what_storage_refuses_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_shards, "retry_delay_seconds", 0)
    built = building(Once(tmp_path, StorageError("a timeout")), Local(count=1))
    assert [item.images for item in built] == [2, 1]
    assert tries(tmp_path) == {"0": 2, "2": 2}


@pytest.mark.parametrize("runner", [Local(count=1), Local(kind="processes", count=1)], ids=["threads", "processes"])
def test_wrong_input_is_not_tried_again(tmp_path: Path, runner: Runner) -> None:
    with pytest.raises(InputError, match=r"^the archive is empty$"):
        building(Once(tmp_path, InputError("the archive is empty")), runner)
    assert tries(tmp_path)["0"] == 1


class Fails:
    """Ends its process, or raises what nobody expects."""

    def __init__(self, *, kill: bool) -> None:
        self.kill = kill

    def __call__(self, numbers: range) -> BuildResult:
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize(("kill", "said"), [(False, "RuntimeError: first line"), (True, "BrokenProcessPool: ")])
def test_a_lost_worker_is_one_line(kill: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_shards, "retries", 0)
    with pytest.raises(TaskError, match=rf"^shard: a task failed or its worker died: {said}") as caught:
        building(Fails(kill=kill), Local(kind="processes", count=1))
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_counted_over_all_tasks(tmp_path: Path, archive: ArchiveRef) -> None:
    for name in ("a/004.png", "b/011.png", "b/033.png"):
        (Path(archive.train) / name).rename(tmp_path / Path(name).name)
        (Path(archive.train) / name).write_bytes(b"no image")
    try:
        with pytest.raises(InputError, match=r"of the first \d+ images are unreadable, more than shard.max_unreadable"):
            sharding(tmp_path / "out", archive, Local(count=2))
    finally:
        for name in ("a/004.png", "b/011.png", "b/033.png"):
            (tmp_path / Path(name).name).replace(Path(archive.train) / name)


@pytest.mark.parametrize(("runner", "package"), [(Cluster(), "prefect_dask"), (Cluster(kind="ray"), "prefect_ray")])
def test_a_missing_extra_is_one_line(runner: Cluster, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    name = package.replace("_", "-")
    text = rf"shard\.runner: {runner.kind} needs {name} here .* pip install 'ditflow\[{runner.kind}\]'"
    with pytest.raises(InputError, match=text):
        building(Fails(kill=False), runner)


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    dask = pytest.importorskip("dask")
    pattern = r"shard\.runner: dask cannot be used: .*127\.0\.0\.1:1"
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}), pytest.raises(InputError, match=pattern):
        building(Fails(kill=False), Cluster(address="tcp://127.0.0.1:1"))


SLOW = """
import sys, time
from pathlib import Path
from prefect import flow
from flows.shard_tasks import distribute
from storage.shards.runners import Local
from storage.shards.shard import BuildResult
sys.path.insert(0, {folder!r})
from slow import slow

@flow
def working(runner):
    list(distribute(runner)(slow, [range(k, k + 1) for k in range(200)]))

working({runner})
"""
BUILD = """
import time
from pathlib import Path
from storage.shards.shard import BuildResult

def slow(numbers):
    Path({folder!r}, str(numbers.start)).touch()
    time.sleep(1)  # the last one would end minutes after the run was
    return BuildResult(images=1, unreadable=())
"""


@pytest.mark.parametrize(
    ("runner", "number"),
    [
        ("Local(kind='processes', count=2)", signal.SIGKILL),
        pytest.param("Local(kind='processes', count=2)", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("Local(count=2)", signal.SIGKILL, marks=pytest.mark.full),
        pytest.param("Local(count=2)", signal.SIGTERM, marks=pytest.mark.full),
    ],
)
def test_a_run_that_is_ended_leaves_nothing_behind(
    tmp_path: Path, runner: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(BUILD.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    run = start(SLOW.format(folder=str(tmp_path), runner=runner))
    until(lambda: (tmp_path / "3").exists())
    children = descendants(run.pid)
    run.send_signal(number)
    until(lambda: gone(run.pid) and all_gone(children))
    assert not (tmp_path / "199").exists()
    run.wait()
