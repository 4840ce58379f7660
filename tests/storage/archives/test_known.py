"""What was listed on this machine is not listed again until it changes."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.archives import known
from storage.archives.known import input_digests
from storage.archives.open import Archive, ArchiveRef, open_splits
from storage.rows import cache


@pytest.fixture
def ref(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArchiveRef:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "train.zip", 2)
    return ArchiveRef(train=str(tmp_path / "train.zip"))


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[ArchiveRef]:
    """The archives that were listed."""
    return listing(monkeypatch, lambda: None)


def listing(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]) -> list[ArchiveRef]:
    listed = []

    def open_counted(archive: ArchiveRef) -> dict[str, Archive]:
        listed.append(archive)
        splits = open_splits(archive)
        meanwhile()
        return splits

    monkeypatch.setattr(known, "open_splits", open_counted)
    return listed


def write(path: Path, count: int) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for number in range(count):
            file.writestr(f"cat/{number}.png", b"%d" % number)


def test_a_file_is_listed_once_until_it_changes(ref: ArchiveRef, listings: list[ArchiveRef]) -> None:
    first = input_digests(ref)
    assert first == {"train": open_splits(ref)["train"].digest}
    assert input_digests(ref) == first
    assert len(listings) == 1
    write(Path(ref.train), 3)
    second = input_digests(ref)
    assert second == {"train": open_splits(ref)["train"].digest} != first
    assert len(listings) == 2


def test_held_out_files_and_files_of_a_pattern_count(
    ref: ArchiveRef, tmp_path: Path, listings: list[ArchiveRef]
) -> None:
    write(tmp_path / "held.zip", 1)
    both = ArchiveRef(train=ref.train, held_out=str(tmp_path / "held.zip"))
    assert {*input_digests(both)} == {"train", "held_out"}
    assert {*input_digests(ref)} == {"train"}
    assert len(listings) == 2
    write(tmp_path / "held.zip", 2)
    assert input_digests(both)["held_out"] == open_splits(both)["held_out"].digest
    assert len(listings) == 3


def test_a_folder_is_listed_each_time(tmp_path: Path, ref: ArchiveRef, listings: list[ArchiveRef]) -> None:
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    (tmp_path / "folder" / "cat" / "0.png").write_bytes(b"0")
    folder = ArchiveRef(train=str(tmp_path / "folder"), held_out=ref.train)
    first = input_digests(folder)
    (tmp_path / "folder" / "cat" / "1.png").write_bytes(b"1")
    assert input_digests(folder)["train"] != first["train"]
    assert len(listings) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"train": "0"}', b"[", b"\xff"])
def test_a_damaged_entry_is_made_anew(damage: bytes, ref: ArchiveRef, listings: list[ArchiveRef]) -> None:
    first = input_digests(ref)
    (entry,) = (cache.root() / "listed").iterdir()
    entry.write_bytes(damage)
    assert input_digests(ref) == first
    assert input_digests(ref) == first
    assert len(listings) == 2


def test_what_changes_while_it_is_listed_is_not_kept(ref: ArchiveRef, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = listing(monkeypatch, lambda: os.utime(ref.train, ns=(len(listed), len(listed))))
    input_digests(ref)
    input_digests(ref)
    assert len(listed) == 2
