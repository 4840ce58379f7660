import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image
from recorder import Recorder

from storage import uri, verify
from storage.archives.account import SplitAccount
from storage.archives.known import input_digests
from storage.archives.open import Archive, ArchiveRef, open_archive
from storage.errors import InputError, StorageError
from storage.manifest import StageOutput, stage_output
from storage.order import permutation
from storage.pieces import Pieces
from storage.shards import shard
from storage.shards.runners import Local
from storage.shards.shard import ShardConfig, ShardManifest, read_images
from storage.shards.summary import summary
from storage.tracker import NullTracker

CONFIG = ShardConfig(images_per_shard=7, runner=Local(count=2))


@pytest.fixture
def archive(tmp_path: Path, write_archive: Callable[..., Path]) -> ArchiveRef:
    train = write_archive(tmp_path / "train", {"cat": 11, "dog": 12})
    held_out = write_archive(tmp_path / "held_out", {"dog": 5}, seed=1)
    return ArchiveRef(train=str(train), held_out=str(held_out))


def output(root: Path | str, archive: ArchiveRef, config: ShardConfig = CONFIG) -> StageOutput:
    inputs = input_digests(archive)
    return stage_output(str(root), shard.STAGE, shard.VERSION, config, parents={}, inputs=inputs)


def run(root: Path | str, archive: ArchiveRef, config: ShardConfig = CONFIG) -> ShardManifest:
    return shard.run(config, archive, out=output(root, archive, config), tracker=NullTracker())


def objects(manifest: ShardManifest) -> dict[str, bytes]:
    """All bytes of an output but the manifest's own, which tells the time."""
    folder = Path(manifest.uri)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del found["manifest.json"]
    return found


def test_every_image_once_with_its_own_bytes(tmp_path: Path, archive: ArchiveRef) -> None:
    manifest = run(tmp_path / "out", archive)
    assert manifest.class_names == ("cat", "dog")
    assert manifest.counts == {"images": 28, "unreadable": 0, "classes": 2, "shards": 5}
    assert [shard.count for shard in manifest.splits["train"].shards] == [7, 7, 7, 2]
    for split, url in (("train", archive.train), ("held_out", str(archive.held_out))):
        source = open_archive(url, manifest.class_names)
        order = permutation(CONFIG.seed, 0, len(source.members))
        samples = list(read_images(manifest, split))
        assert [sample.source_index for sample in samples] == order.tolist()
        assert [sample.index for sample in samples] == list(range(manifest.splits[split].count))
        for sample in samples:
            member = source.members[sample.source_index]
            assert (sample.name, sample.label) == (member.name, member.label)
            assert sample.data == source.read(member)


def test_the_manifest_accounts_for_all_entries(tmp_path: Path, archive: ArchiveRef) -> None:
    first = run(tmp_path / "first", archive)
    assert list(summary(first)) == [
        ("train", "23 images, 2 classes: cat, dog"),
        ("held_out", "5 images, 2 classes: cat, dog"),
    ]
    (Path(archive.train) / "cat" / ".DS_Store").write_bytes(b"")
    (Path(archive.train) / "README.md").write_bytes(b"")
    (Path(archive.train) / "dog" / "more").mkdir()
    (Path(archive.train) / "dog" / "001.JPEG").rename(Path(archive.train) / "dog" / "more" / "001.JPEG")
    again = run(tmp_path / "again", archive)
    assert list(summary(again))[1:4] == [
        ("", "passed over: 1 file of no class (first: README.md)"),
        ("", "passed over: 1 hidden: the name begins with a dot (first: cat/.DS_Store)"),
        ("", "images in folders below their class: 1 (first: dog/more/001.JPEG)"),
    ]
    assert again.account["held_out"] == SplitAccount(passed_over=(), notes=())


def test_what_is_passed_over_is_no_content(tmp_path: Path, archive: ArchiveRef) -> None:
    first = run(tmp_path / "first", archive)
    (Path(archive.train) / "cat" / ".DS_Store").write_bytes(b"")
    again = run(tmp_path / "again", archive)
    assert again.account != first.account
    assert (again.digest, again.content) == (first.digest, first.content)


def test_the_manifest_lists_all_files(tmp_path: Path, archive: ArchiveRef) -> None:
    manifest = run(tmp_path / "out", archive)
    assert not verify.faults(manifest, full=True)
    assert set(objects(manifest)) == {entry.path for entry in manifest.files}


def test_other_tools_read_the_tars(tmp_path: Path, archive: ArchiveRef) -> None:
    manifest = run(tmp_path / "out", archive)
    samples = list(read_images(manifest, "train"))
    urls = [f"{manifest.uri}/{shard.path}" for shard in manifest.splits["train"].shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [item["__key__"] for item in theirs] == [f"{sample.source_index:08d}" for sample in samples]
    assert [int(item["cls"]) for item in theirs] == [sample.label for sample in samples]
    assert [item.get("png") or item["jpg"] for item in theirs] == [sample.data for sample in samples]
    with tarfile.open(urls[0]) as tar:
        members = tar.getmembers()
    assert len(members) == 14
    assert {(item.mtime, item.uname, item.mode) for item in members} == {(0, "ditflow", 0o444)}


def test_the_tars_are_those_of_webdatasets_own_writer(tmp_path: Path, archive: ArchiveRef) -> None:
    manifest = run(tmp_path / "out", archive)
    for first, tar_file in zip(range(0, 28, 7), manifest.splits["train"].shards, strict=True):
        theirs = io.BytesIO()
        with webdataset.TarWriter(theirs, encoder=False, mtime=0, user="ditflow", group="ditflow") as tar:
            for item in read_images(manifest, "train", first, first + tar_file.count):
                ending = "png" if item.data[:4] == b"\x89PNG" else "jpg"
                sample = {"__key__": f"{item.source_index:08d}", "cls": str(item.label).encode(), ending: item.data}
                tar.write(sample)
        assert manifest.read_object(tar_file.path) == theirs.getvalue()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_images_give_the_same_bytes(tmp_path: Path, archive: ArchiveRef, workers: int) -> None:
    first = run(tmp_path / "one", archive)
    moved = shutil.copytree(archive.train, tmp_path / "moved")
    second = run(
        tmp_path / "two",
        ArchiveRef(train=str(moved), held_out=archive.held_out),
        CONFIG.model_copy(update={"runner": Local(count=workers)}),
    )
    assert second.digest == first.digest
    assert objects(second) == objects(first)


def test_another_seed_gives_another_order(tmp_path: Path, archive: ArchiveRef) -> None:
    first, second = (run(tmp_path, archive, ShardConfig(seed=seed)) for seed in (0, 1))
    orders = [[sample.source_index for sample in read_images(manifest, "train")] for manifest in (first, second)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def faults(folder: Path) -> Iterator[Callable[[], object]]:
    """What a kill, a disk or a hand may leave behind."""
    tar, record = folder / "train/00001.tar", folder / "records/train-00002.json"
    yield lambda: None
    yield tar.unlink
    yield lambda: tar.write_bytes(tar.read_bytes()[:1024])
    yield lambda: tar.write_bytes(b"")
    yield record.unlink
    yield lambda: record.write_bytes(record.read_bytes()[:50])
    yield lambda: record.write_text("{}")
    yield lambda: record.write_bytes(record.read_bytes().replace(b'"label":0', b'"label":1', 1))
    yield lambda: (folder / "held_out/00000.tar").unlink()
    yield lambda: (folder / "train/.00003.tar.0123.tmp").write_bytes(b"half")


@pytest.mark.parametrize("number", range(10))
def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path: Path, archive: ArchiveRef, number: int) -> None:
    manifest = run(tmp_path / "out", archive)
    whole, folder = objects(manifest), Path(manifest.uri)
    (folder / "manifest.json").unlink()
    list(faults(folder))[number]()
    again = run(tmp_path / "out", archive)
    found = objects(again)
    found.pop("train/.00003.tar.0123.tmp", None)
    assert found == whole
    assert again.files == manifest.files


def test_a_committed_shard_is_not_built_again(
    tmp_path: Path, archive: ArchiveRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = run(tmp_path / "out", archive)
    folder = Path(manifest.uri)
    (folder / "manifest.json").unlink()
    (folder / "train/00002.tar").unlink()
    built, pack = [], shard.pack

    def counted(tar: Pieces, source: Archive, split: str, indices: NDArray[np.int64], min_side: int) -> object:
        built.append((split, list(indices)))
        return pack(tar, source, split, indices, min_side)

    monkeypatch.setattr(shard, "pack", counted)
    run(tmp_path / "out", archive)
    assert built == [("train", list(permutation(CONFIG.seed, 0, 23)[14:21]))]


def test_progress_and_contact_sheet(tmp_path: Path, archive: ArchiveRef, recorder: Recorder) -> None:
    out = output(tmp_path / "out", archive)
    manifest = shard.run(CONFIG, archive, out=out, tracker=recorder)
    assert recorder.steps == [
        (7, 28, "images"),
        (14, 28, "images"),
        (21, 28, "images"),
        (23, 28, "images"),
        (28, 28, "images"),
    ]
    sheet = recorder.artifacts["images.png"]
    assert sheet == manifest.read_object("artifacts/images.png")
    assert Image.open(io.BytesIO(sheet)).size == (7 * 64 + 6 * 2, 64)


BAD = {"zz_empty.png": b"", "zz_text.png": b"no image"}


def spoil(archive: ArchiveRef, encode_image: Callable[..., bytes]) -> None:
    tiny = encode_image(np.zeros((1, 1, 3), np.uint8))
    for name, data in {**BAD, "zz_tiny.png": tiny}.items():
        (Path(archive.train) / "dog" / name).write_bytes(data)


def test_unreadable_files_are_left_out_and_listed(
    tmp_path: Path, archive: ArchiveRef, encode_image: Callable[..., bytes]
) -> None:
    spoil(archive, encode_image)
    manifest = run(tmp_path / "out", archive, ShardConfig(images_per_shard=7, max_unreadable=0.2))
    assert {(item.split, item.name, item.reason) for item in manifest.unreadable} == {
        ("train", "dog/zz_empty.png", "empty file"),
        ("train", "dog/zz_text.png", "not an image"),
        ("train", "dog/zz_tiny.png", "1x1 pixels, smaller than 8"),
    }
    assert manifest.counts == {"images": 28, "unreadable": 3, "classes": 2, "shards": 5}
    samples = list(read_images(manifest, "train"))
    assert [sample.index for sample in samples] == list(range(23))
    assert not any("zz_" in sample.name for sample in samples)


def test_too_many_unreadable_files_stop_the_run(
    tmp_path: Path, archive: ArchiveRef, encode_image: Callable[..., bytes]
) -> None:
    spoil(archive, encode_image)
    config = ShardConfig(images_per_shard=100, max_unreadable=0.05)
    with pytest.raises(
        InputError, match=r"3 of the first 26 images are unreadable.*max_unreadable = 0\.05 of 31"
    ) as caught:
        run(tmp_path / "out", archive, config)
    assert "dog/zz_text.png: not an image" in str(caught.value)
    assert "\n" not in str(caught.value)
    out = output(tmp_path / "out", archive, config)
    assert uri.exists(out.url("records", "train-00000.json"))
    assert not uri.exists(out.url("manifest.json"))


def test_a_split_without_a_readable_image_is_refused(tmp_path: Path, archive: ArchiveRef) -> None:
    for path in Path(str(archive.held_out)).rglob("*.JPEG"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="held_out archive has no readable image"):
        run(tmp_path / "out", archive, ShardConfig(max_unreadable=1))


def test_an_archive_that_changes_under_a_run_is_noticed(
    tmp_path: Path, archive: ArchiveRef, encode_image: Callable[..., bytes]
) -> None:
    out = output(tmp_path / "out", archive)
    spoil(archive, encode_image)
    with pytest.raises(InputError, match="train archive has changed"):
        shard.run(CONFIG, archive, out=out, tracker=NullTracker())


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 9), (7, 14), (20, None), (22, 100), (23, None)])
def test_reading_a_range(tmp_path: Path, archive: ArchiveRef, start: int, stop: int | None) -> None:
    manifest = run(tmp_path / "out", archive)
    everything = list(read_images(manifest, "train"))
    assert list(read_images(manifest, "train", start, stop)) == everything[start:stop]


def test_reading_touches_only_the_tars_it_needs(tmp_path: Path, archive: ArchiveRef) -> None:
    manifest = run(tmp_path / "out", archive)
    for number in (0, 1, 3):
        (Path(manifest.uri) / f"train/{number:05d}.tar").unlink()
    assert [sample.index for sample in read_images(manifest, "train", 14, 21)] == list(range(14, 21))


def test_damage_is_named_at_reading(tmp_path: Path, archive: ArchiveRef) -> None:
    manifest = run(tmp_path / "out", archive)
    path = Path(manifest.uri) / "train/00001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"train/00001\.tar: does not hold the bytes that were committed"):
        list(read_images(manifest, "train"))
    path.unlink()
    with pytest.raises(StorageError, match=r"train/00001\.tar: is missing; run"):
        list(read_images(manifest, "train"))
    with pytest.raises(InputError, match="has no split 'test', only train, held_out"):
        list(read_images(manifest, "test"))


def test_on_a_remote_store(tmp_path: Path, memory: str, archive: ArchiveRef) -> None:
    fs = fsspec.filesystem("memory")
    for path in Path(archive.train).rglob("*.JPEG"):
        fs.pipe_file(f"/root/images/{path.parent.name}/{path.name}", path.read_bytes())
    local = run(tmp_path / "out", ArchiveRef(train=archive.train))
    remote = run(memory, ArchiveRef(train=f"{memory}/images"))
    assert remote.files == local.files
    assert list(read_images(remote, "train")) == list(read_images(local, "train"))


def test_two_runs_at_once_do_no_harm(tmp_path: Path, archive: ArchiveRef, monkeypatch: pytest.MonkeyPatch) -> None:
    create = uri.create

    def late(url: str, data: bytes) -> bool:
        create(url, data)  # someone else was a moment faster
        return create(url, data)

    monkeypatch.setattr(uri, "create", late)
    assert not verify.faults(run(tmp_path / "out", archive), full=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"a file system may not be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_one_line_error_and_committed_shards_stay(
    tmp_path: Path, tiny_disk: Path, write_archive: Callable[..., Path]
) -> None:
    archive = ArchiveRef(train=str(write_archive(tmp_path / "large", {"a": 40}, side=64)))
    config = ShardConfig(images_per_shard=10, runner=Local(count=1))
    with pytest.raises(
        StorageError, match=r"00\d\.tar: the disk is full .*make room and run the same command"
    ) as caught:
        run(tiny_disk, archive, config)
    assert "\n" not in str(caught.value)
    out = output(tiny_disk, archive, config)
    names = [name for name in uri.names(out.url("records")) if name.endswith(".json")]
    assert names
    assert not uri.exists(out.url("manifest.json"))
    for name in names:
        for entry in json.loads(uri.read(out.url("records", name)))["files"]:
            assert uri.file_sha256(out.url(entry["path"])) == entry["sha256"]
    assert not list(tiny_disk.rglob("*.tmp"))
