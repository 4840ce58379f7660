"""The outputs of a root of thousands: the command ``ls`` against a plain loop over the manifests with Python's json."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import Measured, Result, main
from storage.config import Config
from storage.manifest import MANIFEST, Manifest, stage_output
from storage.root import outputs

COUNT = 10_000
STAGES = ("shard", "encode", "train", "sample", "evaluate")


class Values(Config):
    """Forty numbers, as many as a config of a stage has."""

    number: int
    more: dict[str, int] = {f"value_{place}": place for place in range(40)}  # noqa: RUF012  never changed


def contest(root: Path, count: int) -> Measured:
    """Processor seconds in a root of so many outputs, whose manifests the page cache holds."""
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        out = stage_output(str(root), stage, 1, Values(number=number), parents={}, inputs={"images": "0" * 64})
        out.commit(Manifest, [out.put("data", b"0")], counts={"images": number}, metrics={"final_loss": 0.1})
    loop = _processor(lambda: _loop(root))
    read = _processor(lambda: outputs(str(root), ()))
    command = [sys.executable, "-m", "flows.command.main", "ls", "--root", str(root)]
    before = _children()
    lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
    listed = _children() - before
    if len(lines) != count + 1:
        raise ValueError(f"ls lists {len(lines) - 1} of {count} outputs")
    numbers = {"loop": loop, "read": read, "ls": listed}
    return [Result(name, value, "s of a core") for name, value in numbers.items()], {"read_vs_loop": read / loop}


def _loop(root: Path) -> list[str]:
    return [json.loads(path.read_bytes())["digest"] for path in root.glob(f"*/*/{MANIFEST}")]


def _processor(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure() -> Measured:
    """The contest in a temporary root."""
    with tempfile.TemporaryDirectory() as folder:
        return contest(Path(folder), COUNT)


if __name__ == "__main__":
    main(measure, "List a root of ten thousand outputs.")
