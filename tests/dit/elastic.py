"""Training on ranks that torchrun starts, some of which are killed."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tiny

from dit.export import CheckpointManifest
from dit.train import TrainConfig
from storage.latents import LatentManifest

WORKER = """
import json, os, resource, signal, sys, time
from pathlib import Path
from dataclasses import replace
import torch
from dit import train
from storage.latents import LatentManifest
from storage.manifest import StageOutput
from storage.tracker import NullTracker

class Spoilt(train.Batches):
    def __call__(self, step):
        batch = super().__call__(step)
        return replace(batch, x0=batch.x0 * float("nan")) if [self.ranks.rank, step] in spec["spoilt"] else batch

class Killer(NullTracker):
    def progress(self, done, total, unit):
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if attempt < len(spec["kills"]) and spec["kills"][attempt] == [int(os.environ["RANK"]), done]:
            os.kill(os.getpid(), signal.SIGKILL)
        if spec["full"] == [int(os.environ["RANK"]), done]:
            while not list(Path(out.uri).glob("checkpoints/*/record.json")):  # the one before is being saved
                time.sleep(0.01)
            # no file may be longer than this
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

torch.set_num_threads(1)
spec = json.loads(Path(sys.argv[1]).read_text())
os.environ["LOCAL_WORLD_SIZE"] = spec["machine"] or os.environ["LOCAL_WORLD_SIZE"]
train.Batches = Spoilt
config = train.TrainConfig.model_validate(spec["config"])
out = StageOutput.model_validate(spec["out"])
train.run(config, LatentManifest.read(spec["latents"]), out=out, tracker=Killer())
"""


def trained(
    folder: Path,
    store: LatentManifest,
    config: TrainConfig,
    ranks: int,
    kills: Sequence[tuple[int, int]] = (),
    *,
    spoilt: Sequence[tuple[int, int]] = (),
    machine: int | None = None,
    full: tuple[int, int] | None = None,
) -> CheckpointManifest:
    """Train, or go on, in a folder.

    Args:
        kills: the rank that is killed, and after which step, one for each attempt.
        spoilt: ranks and steps, from 0, whose batch is not finite.
        machine: how many ranks believe to share a machine; None is all.
        full: the rank whose disk is full, and from which step on, when a checkpoint has been saved.
    """
    folder.mkdir(exist_ok=True)
    out = tiny.output(folder, CheckpointManifest, config, latents=store)
    values = {"config": config.model_dump(mode="json"), "out": out.model_dump(mode="json"), "latents": store.uri}
    values |= {"kills": list(kills), "spoilt": list(spoilt), "machine": machine and str(machine), "full": full}
    (folder / "spec.json").write_text(json.dumps(values))
    (folder / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*torchrun, f"--max-restarts={len(kills)}", str(folder / "worker.py"), str(folder / "spec.json")],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exitcode: -9") == len(kills)
    return CheckpointManifest.read(out.uri)
