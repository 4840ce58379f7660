"""The same curve for any number of ranks, any micro-batches and any kills."""

import json
import random
from pathlib import Path

import elastic
import numpy as np
import pytest
import synthetic
import tiny

from dit.export import CheckpointManifest
from storage.latents import LatentManifest

CONFIG = tiny.TRAINING.model_copy(update={"checkpoint_every": 2, "keep_checkpoints": 9})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentManifest:
    return synthetic.latents(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store: LatentManifest) -> CheckpointManifest:
    return tiny.run_train(tmp_path_factory.mktemp("alone"), CONFIG, store)


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
    undisturbed = elastic.trained(tmp_path / "undisturbed", store, CONFIG, ranks, [])
    killed = elastic.trained(tmp_path / "killed", store, CONFIG, ranks, kills)
    assert tiny.objects(killed) == tiny.objects(undisturbed)
    halves = CONFIG.model_copy(update={"micro_batch": 8 // ranks // 2})
    cut = elastic.trained(tmp_path / "cut", store, halves, ranks, [])
    expected = losses(alone)
    assert len(expected) == 11
    for found in (undisturbed, cut):
        np.testing.assert_allclose(losses(found), expected, rtol=1e-5)
