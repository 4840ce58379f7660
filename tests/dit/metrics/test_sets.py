"""Any part of a set of images, from wherever they lie."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from dit.metrics.npz import Npz
from dit.metrics.sets import FolderImages, ImageSet, NoiseImages, SplitImages, StoredImages
from dit.sample import SampleManifest
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest


@pytest.fixture(params=["noise", "stored", "split", "folder", "npz"])
def images(
    request: pytest.FixtureRequest, tmp_path: Path, pictures: Path, shards: ShardManifest, samples: SampleManifest
) -> ImageSet:
    if request.param == "noise":
        return NoiseImages(20, 5)
    if request.param == "split":
        return SplitImages(shards, "train", tiny.SIDE)
    if request.param == "folder":
        return FolderImages(str(pictures / "held_out"), tiny.SIDE)
    stored = StoredImages(RowReader(samples), tiny.SIDE, samples.digest)
    if request.param == "stored":
        return stored
    np.savez(tmp_path / "a.npz", stored.reader.array("image"))
    return Npz(str(tmp_path / "a.npz")).images()


def test_a_batch_spans_no_two_stretches(images: ImageSet) -> None:
    whole = np.concatenate(list(images.batches(3)))
    assert whole.shape == (images.count, images.side, images.side, 3)
    assert whole.std() > 0
    parts = list(images.batches(2, [range(1, 4), range(4, 5), range(9, 11)]))
    assert [len(part) for part in parts] == [2, 1, 1, 2]
    assert np.array_equal(np.concatenate(parts), whole[[1, 2, 3, 4, 9, 10]])
