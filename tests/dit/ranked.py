"""Runs a stage on ranks that torchrun starts; also the script of each rank.

A rank writes a line for each progress that it hears of: its number, what is done, and the total.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dit import encode, evaluate, sample
from dit.encode import EncodeConfig
from dit.evaluate import EvaluateConfig
from dit.export import CheckpointManifest
from dit.sample import SampleConfig, SampleManifest
from storage.config import Config
from storage.manifest import Manifest, StageOutput
from storage.shards.shard import ShardManifest
from storage.tracker import NullTracker

STAGES: dict[str, tuple[Any, type[Config], type[Manifest]]] = {
    "encode": (encode.run, EncodeConfig, ShardManifest),
    "sample": (sample.run, SampleConfig, CheckpointManifest),
    "evaluate": (evaluate.run, EvaluateConfig, SampleManifest),
}


class Told(NullTracker):
    """Writes what it is told, and ends the first rank's process when so much is done."""

    def __init__(self, killed_at: int | None) -> None:
        self._killed_at = killed_at

    def progress(self, done: int, total: int, unit: str) -> None:
        sys.stdout.write(f"{os.environ['RANK']} {done} {total}\n")
        sys.stdout.flush()
        if self._killed_at is not None and os.environ["RANK"] == "0" and done >= self._killed_at:
            os._exit(9)


def torchrun(
    tmp_path: Path, ranks: int, config: Config, source: Manifest, out: StageOutput, killed_at: int | None = None
) -> list[list[int]]:
    """Run the stage of an output on so many ranks; return the rank, what was done and the total of each progress."""
    spec = tmp_path / "spec.json"
    values = {"config": config.model_dump(mode="json"), "out": out.model_dump(mode="json")}
    spec.write_text(json.dumps(values | {"source": source.uri, "killed_at": killed_at}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, __file__, str(spec)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert (done.returncode == 0) == (killed_at is None), done.stderr
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def main(path: str) -> None:
    """Run the stage of a spec on this rank."""
    torch.set_num_threads(1)
    spec = json.loads(Path(path).read_text())
    out = StageOutput.model_validate(spec["out"])
    run, config, source = STAGES[out.header.stage]
    tracker = Told(spec["killed_at"])
    run(config.model_validate(spec["config"]), source.read(spec["source"]), out=out, tracker=tracker)


if __name__ == "__main__":
    main(sys.argv[1])
