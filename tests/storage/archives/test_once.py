"""Archives that are listed once."""

from pathlib import Path

import pytest

from storage.archives import open as opening
from storage.archives.once import listed_once
from storage.archives.open import ArchiveRef, open_splits


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Locations that were listed, in order."""
    found, open_archive = list[str](), opening.open_archive
    monkeypatch.setattr(opening, "open_archive", lambda url, *more: found.append(url) or open_archive(url, *more))
    return found


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArchiveRef:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.png").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    return ArchiveRef(train="images")


def test_within_a_block_an_archive_is_listed_once_however_it_is_named(
    archive: ArchiveRef, listings: list[str], tmp_path: Path
) -> None:
    with listed_once():
        first = open_splits(archive)
        assert open_splits(ArchiveRef(train=str(tmp_path / "images"))) is first
        assert open_splits(archive.absolute()) is first
    assert listings == [str(tmp_path / "images")]


def test_without_a_block_and_in_the_next_one_changes_are_seen(
    archive: ArchiveRef, listings: list[str], tmp_path: Path
) -> None:
    seen = [open_splits(archive)["train"].digest, open_splits(archive)["train"].digest]
    (tmp_path / "images" / "cat" / "1.png").write_bytes(b"12")
    seen.append(open_splits(archive)["train"].digest)
    with listed_once():
        seen.append(open_splits(archive)["train"].digest)
        with listed_once():
            open_splits(archive)
        (tmp_path / "images" / "cat" / "1.png").write_bytes(b"123")
        seen.append(open_splits(archive)["train"].digest)
    first, again, changed, same, at_last = seen
    assert first == again != changed == same != at_last != first
    assert len(listings) == 5
