"""What the other stores are trusted with, on a real S3 endpoint over HTTP."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import packing
import pytest
from outputs import made, planned
from s3_endpoint import BUCKET, s3_server

from storage import uri, verify
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef, open_archive
from storage.collect import delete, garbage
from storage.errors import StorageError
from storage.manifest import Manifest, StageOutput, key_of, stage_output
from storage.root import State, outputs
from storage.rows.store import ArraySpec, RowLayout, RowReader, RowWriter
from storage.shards import shard
from storage.shards.runners import Local
from storage.shards.shard import ShardConfig, ShardManifest, read_images
from storage.tracker import NullTracker

CONFIG = ShardConfig(images_per_shard=7, runner=Local(count=2))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket."""
    with s3_server() as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture
def root(bucket: str, request: pytest.FixtureRequest) -> str:
    return uri.join(bucket, request.node.name)


def sharded(root: str, archive: ArchiveRef) -> ShardManifest:
    inputs = input_digests(archive)
    out = stage_output(root, shard.STAGE, shard.VERSION, CONFIG, parents={}, inputs=inputs)
    return shard.run(CONFIG, archive, out=out, tracker=NullTracker())


def test_objects(root: str) -> None:
    url = uri.join(root, "a", "b")
    assert uri.size(url) is None
    assert not uri.exists(url)
    assert uri.names(root) == []
    with pytest.raises(StorageError, match="b: no such object"):
        uri.read(url)
    uri.write(url, b"first")
    uri.write(url, b"second")
    assert (uri.read(url), uri.size(url), uri.names(root)) == (b"second", 6, ["a"])
    assert uri.create(url, b"third") is False
    assert uri.read(url) == b"second"
    uri.remove_tree(root, uri.parent(root))
    assert not uri.exists(url)


@pytest.mark.parametrize("size", [6, 6 << 20])  # one request, and several parts
def test_uploads_piece_by_piece(root: str, size: int) -> None:
    url = uri.join(root, "pieces")
    with pytest.raises(KeyboardInterrupt), uri.writing(url, size) as file:
        file.write(bytes(size))
        raise KeyboardInterrupt
    assert not uri.exists(url)
    with uri.writing(url, size) as file:
        file.write(bytes(size // 2))
        file.write(bytes(size // 2))
    assert uri.read(url) == bytes(size)


def test_objects_of_other_processes_are_seen_at_once(root: str) -> None:
    uri.write(uri.join(root, "1"), b"1")
    assert uri.names(root) == ["1"]
    assert uri.size(uri.join(root, "2")) is None
    key = uri.join(root, "2").removeprefix(f"s3://{BUCKET}/")
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=b"22")
    assert uri.names(root) == ["1", "2"]
    assert uri.size(uri.join(root, "2")) == 2


def test_only_one_of_many_creators_wins(root: str) -> None:
    url, won, gate = uri.join(root, "record"), [], threading.Barrier(8)

    def create(number: int) -> None:
        gate.wait()
        if uri.create(url, str(number).encode()):
            won.append(number)

    workers = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(won) == 1
    assert uri.read(url) == str(won[0]).encode()


def test_images_and_tars_on_s3_are_those_of_a_disk(
    root: str, tmp_path: Path, write_archive: Callable[..., Path]
) -> None:
    folder = write_archive(tmp_path / "train", {"cat": 11, "dog": 12})
    here = sharded(str(tmp_path / "root"), ArchiveRef(train=str(folder)))
    files = packing.files_of(folder)
    uri.write(uri.join(root, "train.tar"), packing.tar(packing.class_tars(files)))
    for name, data in files.items():
        uri.write(uri.join(root, "train", name), data)
    for archive in ("train", "train.tar"):
        there = sharded(uri.join(root, f"root-{archive}"), ArchiveRef(train=uri.join(root, archive)))
        assert (there.digest, there.files) == (here.digest, here.files)
        assert [sample.data for sample in read_images(there, "train")] == [
            sample.data for sample in read_images(here, "train")
        ]


def test_damage_on_s3_is_found_and_repaired(root: str, tmp_path: Path, write_archive: Callable[..., Path]) -> None:
    archive = ArchiveRef(train=str(write_archive(tmp_path / "train", {"cat": 11, "dog": 12})))
    manifest = sharded(root, archive)
    first, second = (uri.join(manifest.uri, "train", f"{number:05d}.tar") for number in (0, 1))
    uri.remove_tree(first, root)
    uri.write(second, uri.read(uri.join(manifest.uri, "train", "00002.tar")))
    found = verify.faults(manifest, full=True)
    assert [fault.entry.path for fault in found] == ["train/00000.tar", "train/00001.tar"]
    verify.withdraw(manifest, found)
    mended = sharded(root, archive)
    assert mended.files == manifest.files
    assert verify.faults(mended, full=True) == []


def test_rows_come_back(
    root: str, tmp_path: Path, new_output: Callable[..., StageOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RowLayout(rows=10, block_rows=4, arrays=(ArraySpec("x", "float16", (2, 3), 2, split_axis0=True),))
    values = np.random.default_rng(0).normal(size=(10, 2, 3)).astype(np.float16)
    writer = RowWriter(new_output(root), layout, {})
    for block in writer.missing():
        start, stop = writer.bounds(block)
        writer.write(block, {"x": values[start:stop]})
    assert writer.missing() == []
    manifest = new_output(root).commit(Manifest, writer.finish())
    for streamed in (False, True):
        reader = RowReader(manifest, tmp_path / "cache", streamed=streamed)
        assert np.array_equal(reader.array("x"), values)
    monkeypatch.setattr("storage.rows.trust._sha256", None)  # ETags tell that nothing has changed
    RowReader(manifest, tmp_path / "cache", streamed=True)


def test_an_unreachable_store_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_MAX_ATTEMPTS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    fsspec.filesystem("s3").clear_instance_cache()
    for work in (uri.read, uri.size, uri.exists, uri.names, lambda url: uri.write(url, b"")):
        with pytest.raises(StorageError, match=r"s3://ditflow/x: cannot be (read|listed|written) \(Could not connect"):
            work("s3://ditflow/x")
    fsspec.filesystem("s3").clear_instance_cache()


def test_tars_are_chosen_by_a_pattern(root: str) -> None:
    for number in range(3):
        tar = packing.tar({"0.png": b"%d" % number, "0.cls": b"7"})
        uri.write(uri.join(root, f"train-{number:03d}.tar"), tar)
        uri.write(uri.join(root, f"val-{number:03d}.tar"), tar)
    for pattern in ("train-*.tar", "train-{000..002}.tar", "train-00[0-9].tar"):
        archive = open_archive(uri.join(root, pattern))
        assert [(m.name, archive.read(m)) for m in archive.members] == [
            (f"7/train-{number:03d}/0.png", b"%d" % number) for number in range(3)
        ]


def test_what_of_a_bucket_is_garbage_goes(root: str) -> None:
    shards, other = (made(planned(root, "shard", value)) for value in range(2))
    latents = made(planned(root, "encode", shards=shards))
    begun = planned(root, "train", latents=latents)
    begun.begin()
    listed = outputs(root, ())
    assert [(each.key, each.state) for each in listed] == [
        (key_of(latents.uri), State.FINISHED),
        *((key, State.FINISHED) for key in sorted(key_of(each.uri) for each in (shards, other))),
        (key_of(begun.uri), State.UNFINISHED),
    ]
    kinds = {"pages": (), "first": (), "working": ()}
    assert not garbage(listed, {}, seconds=3600, **kinds).outputs
    found = garbage(listed, {key_of(begun.uri): "kept"}, seconds=0, **kinds)
    assert {each.key: used.size for each, used in found.outputs.items()} == {
        key_of(other.uri): sum(len(uri.read(uri.join(other.uri, path))) for path in uri.tree(other.uri))
    }
    assert delete(root, found, lambda _: None) == []
    assert [each.key for each in outputs(root, ())] == [each.key for each in listed if each.key != key_of(other.uri)]
    for each in verify.outputs(latents.uri):
        assert isinstance(each, Manifest)
        assert verify.faults(each, full=True) == []
