import io
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import packing
import pytest

from storage.archives import zips
from storage.archives.open import open_archive
from storage.errors import InputError, StorageError

FILES = {"a/1.png": b"one" * 100, "a/sub/2.png": b"two" * 100, "b/3.png": b"three" * 100}


def put(folder: Path, data: bytes | bytearray) -> str:
    (folder / "x.zip").write_bytes(data)
    return str(folder / "x.zip")


def central(data: bytes, name: str) -> int:
    """Where the directory's entry of a file begins."""
    return data.rindex(name.encode()) - 46


def test_hidden_files_and_files_outside_folders_are_skipped(tmp_path: Path) -> None:
    more = {"README.md": b"", "a/.DS_Store": b"", "__MACOSX/._1.png": b""}
    archive = open_archive(put(tmp_path, packing.zipped(FILES | more)))
    assert archive.class_names == ("a", "b")
    assert {member.name: archive.read(member) for member in archive.members} == FILES


def test_classes_below_a_folder(tmp_path: Path) -> None:
    inside = {f"flowers/train/{name}": data for name, data in FILES.items()}
    url = put(tmp_path, packing.zipped(inside | {"flowers/val/a/4.png": b"4"}))
    archive = open_archive(f"zip://flowers/train::{url}")
    assert {member.name: archive.read(member) for member in archive.members} == FILES
    with pytest.raises(InputError, match=r"x\.zip/flowers: 'train' and 'val' are splits"):
        open_archive(url)
    with pytest.raises(InputError, match="no images; put the images of each class"):
        open_archive(f"zip://test::{url}")


def test_bytes_before_and_between_files_are_ignored(tmp_path: Path) -> None:
    """A zip behind a program that unpacks it, its sizes behind the files as a stream has them."""

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

    stream = Stream()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in FILES.items():
            packed.writestr(name, data)
    archive = open_archive(put(tmp_path, b"#!/bin/sh\n" * 9 + stream.getvalue()))
    assert {member.name: archive.read(member) for member in archive.members} == FILES


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    data = bytearray(packing.zipped({"a/1.png": bytes(1 << 20)}, zipfile.ZIP_DEFLATED))
    struct.pack_into("<I", data, central(data, "a/1.png") + 24, 1 << 30)
    with pytest.raises(InputError, match=r"a/1\.png: 1,073,741,824 bytes, more than the 268,435,456 allowed"):
        open_archive(put(tmp_path, data))


def test_a_file_is_unpacked_no_further_than_its_listed_size(tmp_path: Path) -> None:
    data = bytearray(packing.zipped({"a/1.png": bytes(1 << 24)}, zipfile.ZIP_DEFLATED))
    struct.pack_into("<I", data, central(data, "a/1.png") + 24, 1000)
    archive = open_archive(put(tmp_path, data))
    tracemalloc.start()
    with pytest.raises(StorageError, match="size or checksum differs from the listed one"):
        archive.read(archive.members[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_files_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """Bombs of many files that all unpack one kernel."""
    data = bytearray(packing.zipped(FILES))
    struct.pack_into("<I", data, central(data, "b/3.png") + 42, 1)  # begins inside the first
    with pytest.raises(InputError, match="overlaps the next file"):
        open_archive(put(tmp_path, data))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(8, 1, "encrypted"), (10, 12, "compression method 12; pack the zip again, stored or deflated")],
)
def test_what_cannot_be_read_by_range_is_refused(tmp_path: Path, offset: int, value: int, message: str) -> None:
    data = bytearray(packing.zipped(FILES))
    struct.pack_into("<H", data, central(data, "b/3.png") + offset, value)
    with pytest.raises(InputError, match=rf"b/3\.png: {message}"):
        open_archive(put(tmp_path, data))


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        warnings.simplefilter("ignore")
        packed.writestr("a/1.png", b"1")
        packed.writestr("a/1.png", b"2")
    with pytest.raises(InputError, match=r"a/1\.png: two files have this name"):
        open_archive(f"{tmp_path}/x.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("position", [3, 40])
def test_damage_is_named_at_reading(tmp_path: Path, method: int, position: int) -> None:
    data = bytearray(packing.zipped(FILES, method))
    data[position] ^= 0x55
    archive = open_archive(put(tmp_path, data))
    with pytest.raises(StorageError, match=r"x\.zip/a/1\.png: cannot be read \(.*byte 0") as caught:
        archive.read(archive.members[0])
    assert "\n" not in str(caught.value)
    assert archive.read(archive.members[2]) == FILES["b/3.png"]


def test_a_directory_that_has_lost_an_entry_is_damaged(tmp_path: Path) -> None:
    """The entry is taken for the comment of the one before; `zipfile` itself does not notice."""
    data = bytearray(packing.zipped(FILES))
    struct.pack_into("<H", data, central(data, "a/1.png") + 32, 46 + len("a/sub/2.png"))
    with pytest.raises(InputError, match="damaged or not a zip \\(2 files in its directory instead of 3\\)"):
        open_archive(put(tmp_path, data))


def test_more_files_than_the_small_record_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the small record had two bits for the number of files, not sixteen."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    monkeypatch.setattr(zips, "_IN_64", 3)
    files = {f"a/{number}.png": b"1" for number in range(4)}
    data = bytearray(packing.zipped(files))
    end, end_64 = data.rindex(b"PK\x05\x06"), data.rindex(b"PK\x06\x06")
    struct.pack_into("<HH", data, end + 8, 3, 3)
    assert len(open_archive(put(tmp_path, data)).members) == 4
    struct.pack_into("<Q", data, end_64 + 32, 5)
    with pytest.raises(InputError, match="4 files in its directory instead of 5"):
        open_archive(put(tmp_path, data))
    struct.pack_into("<HH", data, end + 8, 0, 0)  # as old tools count, without the larger record
    assert len(open_archive(put(tmp_path, data[:end_64] + data[end:])).members) == 4
