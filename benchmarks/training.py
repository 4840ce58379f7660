"""Whole training runs: the wait for data and for checkpoints, and the gain from a second process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks import loader
from benchmarks.common import Measured, Result
from dit import train
from dit.export import CheckpointManifest
from dit.models.choice import DiTChoice
from dit.training.config import TrainConfig
from storage.latents import LatentManifest
from storage.manifest import stage_output
from storage.tracker import NullTracker

INTERVAL = 4
"""Steps between two records. The first interval warms up; a checkpoint after the second is written in the third."""
ROWS = 1024
"""Latents in the store."""
TURNS = 2
"""Runs of one process and of two, in turns; the fastest count, because other work on the machine only adds time."""
SMALL = TrainConfig(
    model=DiTChoice(size="S"),
    batch_size=2,
    steps=3 * INTERVAL,
    log_every=INTERVAL,
    checkpoint_every=2 * INTERVAL,
    flips=False,
    precision="bfloat16" if torch.cuda.is_available() else "float32",
)

Rates = dict[int, dict[str, float]]
"""The metrics that a run records, by step."""


class Recorder(NullTracker):
    """Keeps the metrics."""

    def __init__(self) -> None:
        self.rates: Rates = {}

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Keep scalars at a step."""
        self.rates[step] = dict(values)


def measure(config: TrainConfig = SMALL, shape: tuple[int, int, int] = (4, 32, 32)) -> Measured:
    """Measure eager steps of DiT-S/2 with the local reader; two processes all-reduce gradients over gloo on the CPU.

    The stall is the extra time of the interval after a checkpoint over the one before, so other work on the machine
    adds to it or subtracts from it.
    """
    with tempfile.TemporaryDirectory() as folder:
        values = np.random.default_rng(0).standard_normal((ROWS, *shape)).astype(np.float16)
        latents = loader.write(loader.Task(rows=ROWS, shape=shape), folder, np.abs(values))
        alone = trained(config, latents, Path(folder, "alone"))
        speeds = {1: 0.0, 2: 0.0}
        for turn in range(TURNS):
            for count in speeds:
                spec = Path(folder, f"ranks-{count}-{turn}.json")
                speeds[count] = max(speeds[count], _of_ranks(count, config, latents, spec))
    before, after = (config.batch_size / alone[at * INTERVAL]["images_per_second"] for at in (2, 3))
    stall = INTERVAL * (after - before)
    every = TrainConfig().checkpoint_every
    results = [
        Result("s2_data_wait", 100 * alone[2 * INTERVAL]["data_wait_share"], "% of the step"),
        Result("s2_checkpoint_stall", stall, "s"),
        Result("s2_checkpoint_share", 100 * stall / (before * every), f"% of {every:,} steps"),
        *(Result(f"s2_gloo_{count}", speed, "images/s") for count, speed in speeds.items()),
    ]
    return results, {"ddp_scaling": speeds[2] / (2 * speeds[1])}


def trained(config: TrainConfig, latents: LatentManifest, folder: Path) -> Rates:
    """Train on all ranks and return what the first has recorded."""
    recorder = Recorder()
    out = stage_output(str(folder), CheckpointManifest.STAGE, 1, config, parents={}, inputs={})
    train.run(config, latents, out=out, tracker=recorder)
    return recorder.rates


def _of_ranks(count: int, config: TrainConfig, latents: LatentManifest, spec: Path) -> float:
    """Images per second of ``count`` processes with one thread each, and the config's batch size for each process."""
    changes = {"batch_size": count * config.batch_size, "steps": 2 * INTERVAL, "precision": "float32"}
    given = config.model_copy(update=changes)
    spec.write_text(json.dumps({"config": given.model_dump(mode="json"), "latents": latents.uri}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*torchrun, "-m", "benchmarks.training", str(spec)], env=env, check=True, stdout=sys.stderr)
    return float(spec.with_suffix(".speed").read_text())


def main(path: str) -> None:
    """Train on one of the ranks, from a spec file; the first writes the images per second beside it."""
    spec = json.loads(Path(path).read_text())
    rates = trained(TrainConfig.model_validate(spec["config"]), LatentManifest.read(spec["latents"]), Path(path + ".d"))
    if os.environ["RANK"] == "0":
        Path(path).with_suffix(".speed").write_text(str(rates[2 * INTERVAL]["images_per_second"]))


if __name__ == "__main__":
    main(sys.argv[1])
