"""Images alone in a tar, with a list of their classes or with ImageNet's devkit, which is made here as published."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import packing
import pytest
from scipy.io import savemat

from storage.archives import held_out
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef, open_archive
from storage.errors import InputError, StorageError

SYNSETS = [(1, "cat", 0), (2, "dog", 0), (3, "animal", 2), (4, "fox", 0)]
TRUTH = b"2\n1\n2\n"
DATA = "ILSVRC2012_devkit_t12/data"


def put(folder: Path, data: bytes, name: str) -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def meta_mat(name: str = "synsets") -> bytes:
    """A table of synsets, compressed as the published one is."""
    columns = [
        *(("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("gloss", object)),
        *(("num_children", object), ("children", object), ("wordnet_height", object)),
    ]
    rows = [
        (number, wnid, f"{wnid}, beast", "lives", children, np.arange(children), 1)
        for number, wnid, children in SYNSETS
    ]
    buffer = io.BytesIO()
    savemat(buffer, {name: np.array(rows, columns).reshape(-1, 1), "more": 1}, do_compression=True)
    return buffer.getvalue()


def devkit(**files: bytes | None) -> bytes:
    """A devkit with some files replaced, or left out."""
    given = {"meta": meta_mat(), "truth": TRUTH} | files
    names = {"meta": f"{DATA}/meta.mat", "truth": f"{DATA}/ILSVRC2012_validation_ground_truth.txt"}
    packed = {names.get(name, name): data for name, data in given.items() if data is not None}
    return gzip.compress(packing.tar({"ILSVRC2012_devkit_t12/readme.txt": b"read me", **packed}), mtime=0)


@pytest.fixture
def split(tmp_path: Path, write_archive: Callable[..., Path]) -> ArchiveRef:
    """A folder to train on; three images alone, whose names do not tell the class, and their list."""
    train = write_archive(tmp_path / "train", {"cat": 2, "dog": 2})
    put(tmp_path, packing.tar({"val/3.png": b"33", "val/1.png": b"1", "val/2.png": b"2"}), "val.tar")
    put(tmp_path, b"dog\ncat\ndog\n", "val.txt")
    return ArchiveRef(train=str(train), held_out=f"{tmp_path}/val.tar", held_out_labels=f"{tmp_path}/val.txt")


def test_a_list_labels_images_in_the_order_of_their_names(split: ArchiveRef, tmp_path: Path) -> None:
    archive = open_archive(str(split.held_out), ("cat", "dog"), split.held_out_labels)
    read = {archive.read(member): (member.name, member.label) for member in archive.members}
    assert read == {b"1": ("dog/val/1.png", 1), b"2": ("cat/val/2.png", 0), b"33": ("dog/val/3.png", 1)}
    folders = {"dog/val/1.png": b"1", "cat/val/2.png": b"2", "dog/val/3.png": b"33"}
    assert open_archive(put(tmp_path, packing.tar(folders), "folders.tar"), ("cat", "dog")).digest == archive.digest


def test_another_list_is_another_input(split: ArchiveRef) -> None:
    first = input_digests(split)
    Path(str(split.held_out_labels)).write_text("dog\ndog\ndog\n")
    second = input_digests(split)
    assert second["train"] == first["train"]
    assert second["held_out"] != first["held_out"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # UTF-16 begins with a mark too
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_may_come_from_any_system(split: ArchiveRef, encoding: str, end: str) -> None:
    expected = input_digests(split)
    Path(str(split.held_out_labels)).write_bytes(end.join(["dog", "cat", "dog", ""]).encode(encoding))
    assert input_digests(split) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dög\ncat\ndog\n".encode("latin-1"), r"val\.txt: not UTF-8 text from byte 1 on; save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"val\.txt: a Git LFS pointer, not the file itself"),
        (b"dog\ncat\n", r"val\.txt: 2 class names for the 3 files of .*val\.tar"),
        (b"dog\ncat\ndog\ncat\n", "4 class names for the 3 files"),
        (b"dog\nant\ndog\n", "class 'ant' is not one of the 2 classes to train on"),
        (b"2\n1\n2\n", "class '1' is not one of the 2 classes to train on"),
    ],
)
def test_lists_that_do_not_match_the_images(split: ArchiveRef, text: bytes, message: str) -> None:
    Path(str(split.held_out_labels)).write_bytes(text)
    with pytest.raises(InputError, match=message) as caught:
        input_digests(split)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_image_is_named(split: ArchiveRef, tmp_path: Path) -> None:
    files = {f"val/{number}.png": b"1" for number in (1, 2, 3)}
    put(tmp_path, packing.tar(files | {"val/README": b"", "val/.DS_Store": b"", "val/Thumbs.db": b""}), "val.tar")
    with pytest.raises(InputError, match=r"3 class names for the 4 files of .*val\.tar \(one of them is val/README\)"):
        input_digests(split)


def test_a_list_that_is_missing_or_without_a_tar_is_an_error(split: ArchiveRef) -> None:
    with pytest.raises(InputError, match="held_out_labels needs a .tar of images without class folders"):
        open_archive(split.train, None, split.held_out_labels)
    Path(str(split.held_out_labels)).unlink()
    with pytest.raises(StorageError, match=r"val\.txt: no such object"):
        input_digests(split)


@pytest.fixture
def published(split: ArchiveRef, tmp_path: Path) -> ArchiveRef:
    """The same with a devkit in place of the list."""
    return split.model_copy(update={"held_out_labels": put(tmp_path, devkit(), "ILSVRC2012_devkit_t12.tar.gz")})


def test_the_devkit_equals_a_list_of_its_synsets(split: ArchiveRef, published: ArchiveRef) -> None:
    archive = open_archive(str(published.held_out), ("cat", "dog"), published.held_out_labels)
    read = {archive.read(member): (member.name, member.label) for member in archive.members}
    assert read == {b"1": ("dog/val/1.png", 1), b"2": ("cat/val/2.png", 0), b"33": ("dog/val/3.png", 1)}
    assert input_digests(published) == input_digests(split)


def test_a_ground_truth_saved_by_windows_is_read(split: ArchiveRef, published: ArchiveRef) -> None:
    Path(str(published.held_out_labels)).write_bytes(devkit(truth=b"\xef\xbb\xbf2\r\n1\r\n2\r\n"))
    assert input_digests(published) == input_digests(split)


def mat(kind: int, body: bytes) -> bytes:
    return b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + struct.pack("<II", kind, len(body)) + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>404</html>", "an HTML page, not the file itself"),
        (devkit(truth=b"version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer, not the file itself"),
        (devkit(meta=None), r"0 files meta\.mat instead of one"),
        (devkit(truth=None), r"0 files ILSVRC2012_validation_ground_truth\.txt instead of one"),
        (devkit(**{"old/meta.mat": b""}), r"2 files meta\.mat instead of one"),
        (devkit(truth=b"2\n1\n5\n"), r"line 3 of ILSVRC2012_validation_ground_truth\.txt: '5' is not a class"),
        (devkit(truth=b"2\n3\n2\n"), r"line 2 of .*: '3' is not a class in meta\.mat"),  # an inner node
        (devkit(truth=b"2\ndog\n2\n"), "'dog' is not a class"),
        (devkit(truth=b"2\n1\n"), r"2 class names for the 3 files of .*val\.tar"),
        (devkit(truth=b"2\n1\n4\n"), "class 'fox' is not one of the 2 classes to train on"),
        (devkit(meta=b""), r"meta\.mat has no table of synsets \(not a MATLAB file of version 5\)"),
        (devkit(meta=meta_mat("others")), "no table of synsets"),
        (devkit(meta=meta_mat()[:400]), "no table of synsets"),
        (devkit(meta=mat(15, b"not zlib")), "no table of synsets"),
        (devkit(meta=mat(14, b"")), "no table of synsets"),
        (gzip.compress(b"words", mtime=0), "damaged or not a tar, from byte 0 on"),
        (b"words", "damaged or not a gzip file"),
        (devkit()[:-20], "damaged or not a gzip file"),
        (devkit()[:40] + bytes(20) + devkit()[60:], "damaged or not a gzip file"),
        (b"", "damaged or not a tar"),
    ],
)
def test_damaged_devkits_are_refused(published: ArchiveRef, data: bytes, message: str) -> None:
    Path(str(published.held_out_labels)).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        input_digests(published)
    assert "\n" not in str(caught.value)
    assert "ILSVRC2012_devkit_t12.tar.gz" in str(caught.value) or "val.tar: class" in str(caught.value)


def test_unpacked_sizes_are_bounded(published: ArchiveRef, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(str(published.held_out_labels))
    monkeypatch.setattr(held_out, "MAX_DEVKIT_BYTES", 1 << 20)
    assert input_digests(published)
    zeros = bytes((1 << 20) + 1)
    for data in (zeros, gzip.compress(zeros), devkit(other=zeros)):
        path.write_bytes(data)
        with pytest.raises(InputError, match="more than 1,048,576 bytes, too large for ImageNet's devkit"):
            input_digests(published)
    path.write_bytes(devkit(meta=mat(15, zlib.compress(zeros))))
    with pytest.raises(InputError, match=r"meta\.mat .*\(more than 1,048,576 bytes when unpacked\)"):
        input_digests(published)


def test_a_missing_devkit_is_an_error(published: ArchiveRef) -> None:
    Path(str(published.held_out_labels)).unlink()
    with pytest.raises(StorageError, match=r"devkit_t12\.tar\.gz: no such object"):
        input_digests(published)
