"""Any part of a set of images, from wherever they lie."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from dit.metrics.npz import Npz
from dit.metrics.sets import FolderImages, ImageSet, NoiseImages, SplitImages, StoredImages
from dit.sample import SampleManifest
from storage.archives.open import open_archive
from storage.errors import InputError
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


def test_ranges_that_follow_each_other_read_each_tar_once(
    shards: ShardManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, theirs = list[str](), ShardManifest.read_object

    def noted(manifest: ShardManifest, path: str, most: int | None = None) -> bytes:
        read.append(path)
        return theirs(manifest, path, most)

    monkeypatch.setattr(ShardManifest, "read_object", noted)
    images = SplitImages(shards, "train", tiny.SIDE)
    parts = [range(first, min(first + 3, images.count)) for first in range(0, images.count, 3)]
    assert sum(len(batch) for batch in images.batches(2, parts)) == images.count
    assert [path for path in read if path.endswith(".tar")] == [shard.path for shard in shards.splits["train"].shards]


@pytest.fixture
def reference(tmp_path: Path, pictures: Path) -> Path:
    """Class folders of which one is a link, as is a folder inside another."""
    folder = tmp_path / "reference"
    classes = sorted((pictures / "train").iterdir())
    shutil.copytree(classes[0], folder / "a")
    (folder / "b").symlink_to(classes[1])
    (folder / "a" / "more").symlink_to(classes[1])
    return folder


def test_a_folder_holds_the_images_that_are_sharded(reference: Path) -> None:
    before = FolderImages(str(reference), tiny.SIDE)
    assert before.count == len(open_archive(str(reference)).members)
    (reference / "a" / "@eaDir" / "1.png").mkdir(parents=True)
    (reference / "a" / "@eaDir" / "1.png" / "SYNOPHOTO_THUMB_M.jpg").write_bytes(b"")
    (reference / "Thumbs.db").write_bytes(b"")
    (reference / "README.md").write_bytes(b"")
    assert FolderImages(str(reference), tiny.SIDE).digest == before.digest


def test_images_are_known_by_name_or_first_bytes(reference: Path) -> None:
    count = FolderImages(str(reference), tiny.SIDE).count
    image = next((reference / "a").glob("*.png"))
    shutil.copy(image, reference / "a" / "image")
    shutil.copy(image, reference / "a" / "image.png.1")
    (reference / "a" / "list").write_bytes(b"PNG files")
    assert FolderImages(str(reference), tiny.SIDE).count == count + 2
    (reference / "a" / "1.avif").write_bytes(b"\0\0\0\x20ftypavif")
    with pytest.raises(InputError, match=r"1\.avif: AVIF is not supported"):
        list(FolderImages(str(reference), tiny.SIDE).batches(8))


@pytest.mark.parametrize(
    ("name", "message"),
    [("more.tar", r"more\.tar: an archive"), ("train/1.png", "'test' and 'train' are splits"), ("a/up", "circle")],
)
def test_folders_that_would_be_read_in_part(reference: Path, name: str, message: str) -> None:
    (reference / "test").mkdir()
    (reference / name).parent.mkdir(exist_ok=True)
    if name == "a/up":
        (reference / name).symlink_to(reference)
    else:
        (reference / name).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        FolderImages(str(reference), tiny.SIDE)
