import io
from pathlib import Path

import numpy as np
import pytest
import tiny
from judging import as_samples, pixels
from PIL import Image

from dit.evaluate import EvaluateConfig
from dit.export import CheckpointManifest
from dit.metrics.extractors.demo_digits import load_digits_classifier
from dit.report.neighbours import neighbours
from storage.images.transforms import load
from storage.shards.shard import ShardManifest, read_images


def test_a_copy_of_a_training_image_is_found(
    tmp_path: Path, pictures: Path, checkpoint: CheckpointManifest, shards: ShardManifest, judge: EvaluateConfig
) -> None:
    training = np.stack([load(each.data, tiny.SIDE) for each in read_images(shards, "train")])
    strange = np.random.default_rng(0).integers(0, 256, (1, tiny.SIDE, tiny.SIDE, 3), np.uint8)
    drawn = np.concatenate([training[17:18], strange, pixels(pictures, "held_out")[0][:3]])
    samples = as_samples(tmp_path, checkpoint, drawn, np.zeros(len(drawn), np.int32))
    found = neighbours(judge, samples, root=str(tmp_path), count=4, nearest=3, tracker=tiny.Recorder())
    features = load_digits_classifier(judge.extractor.weights)(training).double().numpy()
    of_drawn = load_digits_classifier(judge.extractor.weights)(drawn[:4]).double().numpy()
    distances = np.linalg.norm(of_drawn[:, None] - features[None], axis=2)
    np.testing.assert_allclose(found.distances, np.sort(distances, 1)[:, :3], rtol=1e-2, atol=1e-3)
    between = np.linalg.norm(features[:, None] - features[None], axis=2) + np.diag(np.full(len(features), np.inf))
    assert found.usual == pytest.approx(np.median(np.sort(between, 1)[:, 0]), rel=0.05)
    assert found.distances[0][0] < found.usual < found.distances[1][0]
    assert found.among == tiny.COUNT
    grid = np.asarray(Image.open(io.BytesIO(found.picture)))
    step = tiny.SIDE + 2
    assert grid.shape == (4 * step - 2, 4 * step - 2, 3)
    assert np.array_equal(grid[: tiny.SIDE, : tiny.SIDE], training[17])
    assert np.array_equal(grid[: tiny.SIDE, step : step + tiny.SIDE], training[17])
    nearest = int(distances[1].argmin())
    assert np.array_equal(grid[step : step + tiny.SIDE, step : step + tiny.SIDE], training[nearest])
