"""The same curve for any number of ranks, any micro-batches and any kills."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
import tiny

from dit.export import CheckpointManifest
from dit.train import TrainConfig
from storage.latents import LatentManifest

WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
from dit import train
from storage.latents import LatentManifest
from storage.manifest import StageOutput
from storage.tracking import NullTracker

class Killer(NullTracker):
    def progress(self, done, total, unit):
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if attempt < len(spec["kills"]) and spec["kills"][attempt] == [int(os.environ["RANK"]), done]:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
spec = json.loads(Path(sys.argv[1]).read_text())
config = train.TrainConfig.model_validate(spec["config"])
out = StageOutput.model_validate(spec["out"])
train.run(config, LatentManifest.read(spec["latents"]), out=out, tracker=Killer())
"""
CONFIG = tiny.TRAINING.model_copy(update={"checkpoint_every": 2, "keep_checkpoints": 9})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentManifest:
    return synthetic.latents(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store: LatentManifest) -> CheckpointManifest:
    return tiny.run_train(tmp_path_factory.mktemp("alone"), CONFIG, store)


def trained(
    folder: Path, store: LatentManifest, config: TrainConfig, ranks: int, kills: list[tuple[int, int]]
) -> CheckpointManifest:
    """By so many ranks, of which one is killed at a step, again and again: (rank, step)."""
    folder.mkdir()
    out = tiny.output(folder, CheckpointManifest, config, latents=store)
    values = {"config": config.model_dump(mode="json"), "out": out.model_dump(mode="json")}
    (folder / "spec.json").write_text(json.dumps(values | {"latents": store.uri, "kills": kills}))
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


def losses(manifest: CheckpointManifest) -> list[float]:
    """Of the steps up to the last checkpoint, and the last."""
    record = json.loads(max(Path(manifest.uri).rglob("record.json")).read_text())
    return [entry["values"]["loss"] for entry in record["history"]] + [manifest.metrics["final_loss"]]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_micro_batches_and_kills(
    tmp_path: Path, store: LatentManifest, alone: CheckpointManifest, ranks: int
) -> None:
    """Bit-identical on so many ranks, near what one rank does, and near with micro-batches."""
    chance = random.Random(ranks)
    kills = [(chance.randrange(ranks), step) for step in sorted(chance.sample(range(3, 13), 2))]
    undisturbed = trained(tmp_path / "undisturbed", store, CONFIG, ranks, [])
    killed = trained(tmp_path / "killed", store, CONFIG, ranks, kills)
    assert tiny.objects(killed) == tiny.objects(undisturbed)
    halves = CONFIG.model_copy(update={"micro_batch": 8 // ranks // 2})
    cut = trained(tmp_path / "cut", store, halves, ranks, [])
    expected = losses(alone)
    assert len(expected) == 11
    for found in (undisturbed, cut):
        np.testing.assert_allclose(losses(found), expected, rtol=1e-5)
