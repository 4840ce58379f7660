"""Every fault that other readers pass over in silence is found before anything is read."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from row_store import contents, fill

from storage import uri
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef
from storage.config import Config
from storage.errors import StorageError
from storage.manifest import Manifest, stage_output
from storage.rows import cache, trust
from storage.rows.store import RowReader
from storage.shards import shard
from storage.shards.runners import Local
from storage.shards.shard import ShardConfig, ShardManifest, read_images
from storage.tracker import NullTracker

SHARD, OTHER, INDEX = "data/mean/c/1/0/0/0/0", "data/mean/c/0/0/0/0/0", "data/label/c/1"
METADATA = "data/label/zarr.json"
OTHER_BYTES, GONE = "does not hold the bytes", "(is missing|no such object)"
SIZE = rf"(has [\d,]+ bytes instead of|{OTHER_BYTES})"

Change = Callable[[Manifest, bytes], bytes | None]


def row_store(root: str, arrays: dict[str, np.ndarray]) -> Manifest:
    return fill(stage_output(root, "plain", 1, Config(), parents={}, inputs={}), arrays)


def flipped(place: int) -> Change:
    def change(_: Manifest, data: bytes) -> bytes:
        changed = bytearray(data)
        changed[place] ^= 1
        return bytes(changed)

    return change


def another(path: str) -> Change:
    return lambda store, _: uri.read(uri.join(store.uri, path))


def two_writers(store: Manifest, _: bytes) -> bytes:
    """Both began from an empty shard, and the last to put it never saw the rows of the other."""
    arrays = contents()
    arrays["mean"][8:12] = np.nan
    return uri.read(uri.join(row_store("memory://second", arrays).uri, SHARD))


def without_a_chunk(_: Manifest, data: bytes) -> bytes:
    """As zarr leaves out a chunk that was never written, or that equals the fill value."""
    index = data[-36:-20] + b"\xff" * 16
    return data[:-36] + index + google_crc32c.value(index).to_bytes(4, "little")


ROW_FAULTS: dict[str, tuple[str, Change, str]] = {
    "deleted": (SHARD, lambda store, data: None, GONE),
    "empty": (SHARD, lambda store, data: b"", SIZE),
    "truncated": (SHARD, lambda store, data: data[:-7], SIZE),
    "chunk missing": (SHARD, without_a_chunk, OTHER_BYTES),
    "byte flipped": (SHARD, flipped(3), OTHER_BYTES),
    "another shard in its place": (SHARD, another(OTHER), OTHER_BYTES),
    "two writers": (SHARD, two_writers, OTHER_BYTES),
    "index damaged": (INDEX, flipped(-10), OTHER_BYTES),
    "metadata changed": (METADATA, lambda store, data: data.replace(b"int32", b"int16"), OTHER_BYTES),
    "metadata deleted": (METADATA, lambda store, data: None, GONE),
}
TAR, OTHER_TAR = "train/00001.tar", "train/00000.tar"
TAR_FAULTS: dict[str, tuple[str, Change, str]] = {
    "deleted": (TAR, lambda store, data: None, GONE),
    "empty": (TAR, lambda store, data: b"", "has 0 bytes instead of"),
    "truncated at a member": (TAR, lambda store, data: data[: data.index(b".cls", 1024) // 512 * 512], "has .* bytes"),
    "byte flipped": (TAR, flipped(700), OTHER_BYTES),
    "another tar in its place": (TAR, another(OTHER_TAR), OTHER_BYTES),
    "record changed": ("records/train-00001.json", flipped(40), OTHER_BYTES),
}


def damage(store: Manifest, path: str, change: Change) -> None:
    url = uri.join(store.uri, path)
    data = uri.read(url)
    changed = change(store, data)
    assert changed != data
    if changed is None:
        uri.remove_tree(url, store.uri)
    elif local := uri.local_path(url):
        local.write_bytes(changed)  # in place: the inode stays
    else:
        uri.write(url, changed)


@pytest.fixture(params=["in place", "staged", "streamed"])
def reading(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(reading: str, tmp_path: Path, memory: str) -> Iterator[Manifest]:
    yield row_store(str(tmp_path) if reading == "in place" else memory, contents())
    uri.remove_tree("memory://second", "memory://")


def opened(store: Manifest, reading: str, tmp_path: Path) -> RowReader:
    return RowReader(store, tmp_path / "cache", streamed=reading == "streamed")


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_a_fault_of_a_row_store_is_named(store: Manifest, reading: str, tmp_path: Path, fault: str) -> None:
    path, change, state = ROW_FAULTS[fault]
    damage(store, path, change)
    with pytest.raises(StorageError, match=f"{path}: {state}") as caught:
        opened(store, reading, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ROW_FAULTS)
@pytest.mark.parametrize("reading", ["in place", "streamed"], indirect=True)
def test_a_fault_after_a_first_start_is_named(store: Manifest, reading: str, tmp_path: Path, fault: str) -> None:
    opened(store, reading, tmp_path)
    path, change, state = ROW_FAULTS[fault]
    damage(store, path, change)
    with pytest.raises(StorageError, match=f"{path}: {state}"):
        opened(store, reading, tmp_path)


@pytest.mark.parametrize("reading", ["in place", "streamed"], indirect=True)
def test_checked_objects_are_not_read_again(
    store: Manifest, reading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    sha256 = uri.sha256

    def counted(url: str) -> str:
        compared.append(url.partition("/data/")[2])
        return sha256(uri.read(url))

    monkeypatch.setattr("storage.rows.trust._sha256", counted)
    opened(store, reading, tmp_path)
    assert sorted(compared) == sorted(entry.path[5:] for entry in store.files if entry.path.startswith("data/"))
    compared.clear()
    opened(store, reading, tmp_path)
    assert compared == []
    uri.write(uri.join(store.uri, SHARD), uri.read(uri.join(store.uri, SHARD)))
    opened(store, reading, tmp_path)
    assert compared == [SHARD[5:]]


@pytest.mark.parametrize("reading", ["in place", "streamed"], indirect=True)
def test_bits_that_flip_later_are_noticed_by_a_start_that_compares_all_again(
    store: Manifest, reading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uri, "version", lambda url: {"size": "the same"})  # as on a disk whose bits flip
    compared: list[str] = []
    sha256 = trust._sha256
    monkeypatch.setattr(trust, "_sha256", lambda url: compared.append(url) or sha256(url))
    objects = sum(entry.path.startswith("data/") for entry in store.files)
    for start, times in ((None, 1), (None, 1), ("a", 2), ("a", 2), (None, 2), ("b", 3)):
        RowReader(store, tmp_path / "cache", streamed=reading == "streamed", start=start)
        assert len(compared) == times * objects
    damage(store, *ROW_FAULTS["byte flipped"][:2])
    assert opened(store, reading, tmp_path)
    with pytest.raises(StorageError, match=f"{SHARD}: {OTHER_BYTES}"):
        RowReader(store, tmp_path / "cache", streamed=reading == "streamed", start="c")


@pytest.mark.parametrize("reading", ["streamed"], indirect=True)
def test_a_store_without_versions_is_checked_at_every_start(
    store: Manifest, reading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uri, "_VERSION_KEYS", ())
    opened(store, reading, tmp_path)
    damage(store, *ROW_FAULTS["byte flipped"][:2])
    with pytest.raises(StorageError, match=f"{SHARD}: {OTHER_BYTES}"):
        opened(store, reading, tmp_path)


@pytest.mark.parametrize("damaged", [b"", b"[]", b'{"data/mean'])
def test_a_damaged_stamp_only_costs_time(tmp_path: Path, damaged: bytes) -> None:
    store = row_store(str(tmp_path), contents())
    RowReader(store, tmp_path / "cache")
    (stamp,) = (path for path in (tmp_path / "cache/trusted").iterdir() if path.suffix != ".lock")
    stamp.write_bytes(damaged)
    assert len(RowReader(store, tmp_path / "cache")) == 21
    assert len(stamp.read_bytes()) > 100


def test_a_cache_that_is_not_writable_is_an_error(tmp_path: Path) -> None:
    store = row_store(str(tmp_path), contents())
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/.*cannot be written .*; choose a writable folder; for the cache"):
        RowReader(store, tmp_path / "file")


def test_a_long_check_logs_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = row_store(str(tmp_path), contents())
    caplog.set_level(logging.INFO)
    RowReader(store, tmp_path / "quick")
    assert not caplog.messages
    monkeypatch.setattr(cache, "LOG_SECONDS", 0.0)
    RowReader(store, tmp_path / "slow")
    assert caplog.messages[-1] == f"checking {store.uri}: 0.00 GB of 0.00 GB"


@pytest.fixture(params=[False, True], ids=["local", "remote"])
def tars(request: pytest.FixtureRequest, tmp_path: Path, memory: str, write_archive: Callable[..., Path]) -> Manifest:
    archive = ArchiveRef(train=str(write_archive(tmp_path / "images", {"cat": 7, "dog": 5})))
    config = ShardConfig(images_per_shard=5, runner=Local(count=1))
    root = memory if request.param else str(tmp_path)
    out = stage_output(root, shard.STAGE, 1, config, parents={}, inputs=input_digests(archive))
    return shard.run(config, archive, out=out, tracker=NullTracker())


@pytest.mark.parametrize("fault", TAR_FAULTS)
def test_a_fault_of_a_tar_is_named_before_any_of_its_images(tars: ShardManifest, fault: str) -> None:
    path, change, state = TAR_FAULTS[fault]
    damage(tars, path, change)
    seen = []
    with pytest.raises(StorageError, match=f"{path}: {state}"):
        seen += [sample.index for sample in read_images(tars, "train", 5)]
    assert seen == []
