"""Shard and encode, killed again and again."""

import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import stages

from dit.vae import VaeRef

LOGGER = logging.getLogger(__name__)
KILLS, SEED = 30, 4


class Worker:
    """A process that runs the stages on demand."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(self, root: Path) -> int:
        """Begin, and give the number of the process that works."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{root}\n")
        self._process.stdin.flush()
        return self._line()

    def wait(self) -> int:
        """The exit code, or minus the signal that ended it."""
        return self._line()

    def finish(self, root: Path) -> float:
        """Run undisturbed; the seconds that took."""
        begin = time.monotonic()
        self.start(root)
        assert self.wait() == 0
        return time.monotonic() - begin

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture
def worker(pictures: Path, vae: VaeRef) -> Iterator[Worker]:
    command = [sys.executable, stages.__file__, str(pictures), vae.source]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Worker(process)


def contents(root: Path) -> dict[str, object]:
    """The hash of every file; a manifest without when and where it was made. A kill may leave temporary files."""
    found: dict[str, object] = {}
    for path in root.rglob("*"):
        if path.name == "manifest.json":
            values = json.loads(path.read_text().replace(str(root), "ROOT"))
            found[str(path.relative_to(root))] = {key: value for key, value in values.items() if key != "created"}
        elif path.is_file() and not (path.name.startswith(".") and path.suffix == ".tmp"):
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def commits(folder: Path) -> tuple[float, float]:
    """When a stage committed its first unit, and itself."""
    records = [path.stat().st_mtime for path in folder.glob("*/records/*.json")]
    (manifest,) = folder.glob("*/manifest.json")
    return min(records), manifest.stat().st_mtime


def stopped_in(root: Path) -> str:
    """The stage that has begun to commit and is not done, if there is one."""
    for stage in ("encode", "shard"):
        (folder,) = (root / stage).glob("*") if (root / stage).exists() else (None,)
        if folder is not None:
            records = len(list((folder / "records").glob("*.json")))
            return stage if records and not (folder / "manifest.json").exists() else ""
    return ""


@pytest.mark.slow
def test_thirty_kills_and_the_stores_are_those_of_an_undisturbed_run(tmp_path: Path, worker: Worker) -> None:
    worker.finish(tmp_path / "calm")
    began = time.time()
    seconds = worker.finish(tmp_path / "timed")
    first, last = (each - began for each in commits(tmp_path / "timed" / "shard"))
    calm = contents(tmp_path / "calm")
    assert contents(tmp_path / "timed") == calm
    rng, stopped = random.Random(SEED), list[str]()
    for round_ in range(10 * KILLS):
        root, code = tmp_path / str(round_), -1
        while code != 0:
            fresh = not root.exists()
            delay = rng.uniform(first, last) if fresh else rng.uniform(0, seconds)  # the first stage is short
            pid = worker.start(root)
            time.sleep(delay)
            with suppress(ProcessLookupError):  # it was done before
                os.kill(pid, signal.SIGKILL)
            code = worker.wait()
            assert code in (0, -signal.SIGKILL)
            if code:
                stopped.append(stopped_in(root))
                LOGGER.info(f"killed after {delay:.3f} of {seconds:.3f} s in {stopped[-1] or 'between units'}")
        assert contents(root) == calm
        if len(stopped) >= KILLS and {"shard", "encode"} <= set(stopped):
            return
    raise AssertionError(f"killed {len(stopped)} times, in {set(stopped)}")
