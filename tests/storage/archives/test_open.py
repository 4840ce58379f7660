import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from storage.archives import listing
from storage.archives.account import Account
from storage.archives.open import Archive, ArchiveRef, Member, open_archive
from storage.errors import InputError, StorageError
from storage.seal import json_digest


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(archive: Archive) -> list[str]:
    return [member.name for member in archive.members]


def test_members_are_sorted_and_labelled(tmp_path: Path) -> None:
    archive = open_archive(str(write(tmp_path, "dog/b.png", "dog/a.png", "cat/sub/c.png", "README.md")))
    assert archive.class_names == ("cat", "dog")
    assert archive.members == (Member("cat/sub/c.png", 0, 13), Member("dog/a.png", 1, 9), Member("dog/b.png", 1, 9))
    assert archive.read(archive.members[1]) == b"dog/a.png"


def test_hidden_names_are_skipped(tmp_path: Path) -> None:
    archive = open_archive(str(write(tmp_path, "a/1.png", "a/.DS_Store", "a/.cache/2.png", ".git/config")))
    assert listed(archive) == ["a/1.png"]
    assert archive.class_names == ("a",)


def test_names_that_look_like_urls_are_plain_names(tmp_path: Path) -> None:
    names = ["a/x::y.png", "a/50%.png", "a/what?#.png", "a/[1]*.png"]
    archive = open_archive(str(write(tmp_path, *names)))
    assert listed(archive) == sorted(names)
    assert [archive.read(member).decode() for member in archive.members] == sorted(names)


@pytest.mark.parametrize("content", [None, ["sealed"]])
def test_the_digest_is_that_of_the_whole_listing(monkeypatch: pytest.MonkeyPatch, content: list[str] | None) -> None:
    monkeypatch.setattr(listing, "_PIECE", 2)
    files = [listing.ListedFile(name, "ü.png", size, None) for name, size in (("b", 1), ("a", 2), ("c", None))]
    archive = listing.Archive(Account("x"), files, bytes, content=content)
    whole = {"class_names": ["a", "b", "c"], "members": [["a/ü.png", 2], ["b/ü.png", 1], ["c/ü.png", None]]}
    assert archive.digest == json_digest(whole | ({"sealed": content} if content else {}))


def test_digest_is_independent_of_place_and_time_only(tmp_path: Path, memory: str) -> None:
    names = ["a/1.png", "b/2.png"]
    first = open_archive(str(write(tmp_path / "here", *names))).digest
    there = write(tmp_path / "there", *names)
    os.utime(there / "a/1.png", (0, 0))
    fs = fsspec.filesystem("memory")
    for name in names:
        fs.pipe_file(f"/root/{name}", name.encode())
    assert {open_archive(str(there)).digest, open_archive(memory).digest, open_archive(f"file://{there}/").digest} == {
        first
    }
    others = [
        open_archive(str(there), ("a", "b", "c")),
        open_archive(str(write(tmp_path / "more", *names, "b/3.png"))),
        open_archive(str(write(tmp_path / "renamed", "a/1.png", "b/3.png"))),
    ]
    (there / "a/1.png").write_bytes(b"longer than before")
    others.append(open_archive(str(there)))
    assert len({first, *(other.digest for other in others)}) == 5


def test_held_out_follows_the_trained_classes(tmp_path: Path) -> None:
    folder = str(write(tmp_path, "b/1.png"))
    archive = open_archive(folder, ("a", "b", "c"))
    assert archive.members[0].label == 1
    with pytest.raises(InputError, match="class 'b' is not one of the 2 classes to train on"):
        open_archive(folder, ("a", "c"))


@pytest.mark.parametrize(
    ("names", "below", "message"),
    [
        (["a/1.png"], "none", "/none: no such folder of images"),
        (["a/1.png"], "a/1.png", "/a/1.png: neither a folder"),
        (["1.png", ".hidden/2.png"], "", "no class folders; put"),
        (["a/1.png", "b/.keep"], "", "/b: class folder without files"),
    ],
)
def test_unusable_folders(tmp_path: Path, names: list[str], below: str, message: str) -> None:
    write(tmp_path, *names)
    with pytest.raises(InputError, match=message) as caught:
        open_archive(str(tmp_path / below))
    assert "\n" not in str(caught.value)


def test_links_lead_to_files_and_class_folders(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/1.png", "archive/real/2.png")
    (tmp_path / "archive/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "archive/real/3.png").symlink_to(tmp_path / "elsewhere/1.png")
    archive = open_archive(str(tmp_path / "archive"))
    assert listed(archive) == ["linked/1.png", "real/2.png", "real/3.png"]
    assert archive.members[2].size == len("elsewhere/1.png")


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (write(tmp_path, "a/1.png") / "a/gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"cannot be listed .*gone\.png"):
        open_archive(str(tmp_path))


def test_a_pipe_is_not_an_image(tmp_path: Path) -> None:
    os.mkfifo(write(tmp_path, "a/1.png") / "a/pipe.png")
    assert listed(open_archive(str(tmp_path))) == ["a/1.png"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(InputError, match="not printable UTF-8; rename the file"):
        open_archive(str(tmp_path))


def test_a_file_that_vanishes_is_named(tmp_path: Path, write_archive: Callable[..., Path]) -> None:
    archive = open_archive(str(write_archive(tmp_path / "x", {"a": 1})))
    (tmp_path / "x/a/000.JPEG").unlink()
    with pytest.raises(StorageError, match=r"a/000\.JPEG: cannot be read"):
        archive.read(archive.members[0])


def test_locations_are_operational() -> None:
    assert ArchiveRef(train="/a").identity() == {}
    with pytest.raises(ValueError, match="train"):
        ArchiveRef()


@pytest.mark.parametrize(
    "url",
    [
        "s3://me:secret@host/x.zip",
        "zip://flowers::https://me:secret@host/x.zip",
        "https://host/x.zip?X-Amz-Expires=60&X-Amz-Signature=secret",
        "https://host/x.zip?sig=secret",
        "zip://flowers::https://host/x.zip?access_token=secret",
    ],
)
def test_locations_carry_no_credentials(url: str) -> None:
    with pytest.raises(ValueError, match="the URL contains credentials"):
        ArchiveRef(train=url)
