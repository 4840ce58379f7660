"""The same curve for any number of ranks, any micro-batches and any kills."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from forked import Faults, Job, Template

from dit.export import CheckpointManifest
from dit.training.config import TrainConfig
from storage.latents import LatentManifest

CONFIG = tiny.TRAINING.model_copy(update={"checkpoint_every": 2, "keep_checkpoints": 9})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store: LatentManifest) -> CheckpointManifest:
    return tiny.run_train(tmp_path_factory.mktemp("alone"), CONFIG, store)


def losses(manifest: CheckpointManifest) -> list[float]:
    """Of all steps, from the last checkpoint."""
    record = json.loads(max(Path(manifest.uri).rglob("record.json")).read_text())
    return [entry["values"]["loss"] for entry in record["history"]]


def trained(
    template: Template, root: Path, config: TrainConfig, store: LatentManifest, **shape: Any
) -> CheckpointManifest:
    out = tiny.output(root, CheckpointManifest, config, latents=store)
    template.finish(Job(out, config, store, **shape))
    return CheckpointManifest.read(out.uri)


@pytest.mark.parametrize(("count", "cut"), [(1, False), (2, True), pytest.param(4, False, marks=pytest.mark.full)])
def test_ranks_micro_batches_and_kills(
    tmp_path: Path, template: Template, store: LatentManifest, alone: CheckpointManifest, count: int, cut: bool
) -> None:
    """Bit-identical on so many ranks, in micro-batches or not, and near what one rank does without."""
    chance = random.Random(count)
    kills = [(chance.randrange(count), step) for step in sorted(chance.sample(range(3, 13), 2))]
    halves = CONFIG.model_copy(update={"micro_batch": 8 // count // 2})
    config, other = (halves, CONFIG) if cut else (CONFIG, halves)
    faults = Faults(kills, restarts=2)
    killed = trained(template, tmp_path / "killed", config, store, ranks=count, faults=faults)
    calm = alone if count == 1 else trained(template, tmp_path / "calm", config, store, ranks=count)
    assert tiny.objects(killed) == tiny.objects(calm)
    expected = losses(alone)
    assert len(expected) == 12
    for found in (killed, trained(template, tmp_path / "other", other, store, ranks=count)):
        np.testing.assert_allclose(losses(found), expected, rtol=1e-5)
