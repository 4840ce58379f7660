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
@pytest.mark.parametrize(("ranks", "cut"), [(1, False), (2, True), (4, False)])
def test_ranks_micro_batches_and_kills(
    tmp_path: Path, store: LatentManifest, alone: CheckpointManifest, ranks: int, cut: bool
) -> None:
    """Bit-identical on so many ranks, in micro-batches or not, and near what one rank does without."""
    chance = random.Random(ranks)
    kills = [(chance.randrange(ranks), step) for step in sorted(chance.sample(range(3, 13), 2))]
    halves = CONFIG.model_copy(update={"micro_batch": 8 // ranks // 2})
    config, other = (halves, CONFIG) if cut else (CONFIG, halves)
    killed = elastic.trained(tmp_path / "killed", store, config, ranks, kills)
    undisturbed = alone if ranks == 1 else elastic.trained(tmp_path / "undisturbed", store, config, ranks, [])
    assert tiny.objects(killed) == tiny.objects(undisturbed)
    expected = losses(alone)
    assert len(expected) == 11
    for found in (killed, elastic.trained(tmp_path / "other", store, other, ranks, [])):
        np.testing.assert_allclose(losses(found), expected, rtol=1e-5)
