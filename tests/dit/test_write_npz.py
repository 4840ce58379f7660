"""Committed samples as ADM's evaluation suite reads them."""

import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny

from dit.metrics import npz
from dit.metrics.npz import Npz
from dit.sample import SampleManifest
from dit.write_npz import write_npz
from storage.errors import InputError, StorageError
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest
from storage.tracker import NullTracker


def test_numpy_reads_what_the_store_holds(tmp_path: Path, samples: SampleManifest) -> None:
    path, recorder = tmp_path / "deep" / "a.npz", tiny.Recorder()
    write_npz(samples.uri, str(path), recorder)
    with np.load(path) as arrays:
        assert list(arrays) == ["arr_0", "arr_1"]
        assert np.array_equal(arrays["arr_0"], RowReader(samples).array("image"))
        assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
        assert np.array_equal(arrays["arr_1"], RowReader(samples).array("label"))
    with zipfile.ZipFile(path) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None
    assert Npz(str(path)).images().count == 11
    assert recorder.steps[-1] == (11, 11, "images")


def test_a_batch_is_written_before_the_next_is_made(tmp_path: Path) -> None:
    """What lies on the disk grows with the images, so they are not gathered first."""
    sizes = list[int]()

    def batches() -> Iterator[np.ndarray]:
        for number in range(4):
            yield np.full((1, 512, 512, 3), number, np.uint8)
            sizes.extend(path.stat().st_size for path in tmp_path.iterdir())

    npz.write(str(tmp_path / "a.npz"), batches(), np.arange(4), 512)
    assert len(sizes) == 4
    assert all(later - earlier > 500_000 for earlier, later in pairwise(sizes))
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_images_that_cannot_be_read_leave_no_file(tmp_path: Path) -> None:
    def batches() -> Iterator[np.ndarray]:
        yield np.zeros((1, 4, 4, 3), np.uint8)
        raise StorageError("block 1: damaged")

    with pytest.raises(StorageError, match="block 1: damaged"):
        npz.write(str(tmp_path / "a.npz"), batches(), np.arange(2), 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"), [("a.zip", "does not end in .npz"), ("there.npz", "exists already")], ids=["ending", "there"]
)
def test_other_files_are_refused(tmp_path: Path, samples: SampleManifest, name: str, said: str) -> None:
    (tmp_path / "there.npz").write_bytes(b"mine")
    with pytest.raises(InputError, match=said):
        write_npz(samples.uri, str(tmp_path / name), NullTracker())
    assert (tmp_path / "there.npz").read_bytes() == b"mine"


def test_other_stages_are_refused(tmp_path: Path, shards: ShardManifest) -> None:
    with pytest.raises(InputError, match=r"shard"):
        write_npz(shards.uri, str(tmp_path / "a.npz"), NullTracker())
    assert not list(tmp_path.iterdir())
