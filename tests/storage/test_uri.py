import errno
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import uri
from storage.errors import InputError, StorageError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return str(tmp_path) if request.param == "local" else memory


def test_write_replaces_and_read_returns(root: str) -> None:
    url = uri.join(root, "a", "b")
    uri.write(url, b"first")
    uri.write(url, b"second")
    assert uri.read(url) == b"second"
    assert uri.size(url) == 6
    assert uri.names(root) == ["a"]
    assert uri.names(uri.join(root, "a")) == ["b"]


def test_create_keeps_the_first(root: str) -> None:
    url = uri.join(root, "record")
    assert uri.create(url, b"first") is True
    assert uri.create(url, b"second") is False
    assert uri.read(url) == b"first"


def test_absent_objects(root: str) -> None:
    url = uri.join(root, "none")
    assert uri.size(url) is None
    assert not uri.exists(url)
    assert uri.names(url) == []
    with pytest.raises(StorageError, match="none: no such object"):
        uri.read(url)
    with pytest.raises(StorageError, match="none: no such object"):
        uri.file_sha256(url)


def test_file_sha256(root: str) -> None:
    data = bytes(range(256)) * 20_000  # more than one piece
    uri.write(uri.join(root, "big"), data)
    assert uri.file_sha256(uri.join(root, "big")) == hashlib.sha256(data).hexdigest()


def test_an_object_written_in_pieces_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    url = str(tmp_path / "folder" / "pieces")
    with pytest.raises(KeyboardInterrupt), uri.writing(url, 9) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert uri.names(str(tmp_path / "folder")) == []
    with uri.writing(url, 9) as file:
        file.write(b"half")
        assert not uri.exists(url)
        file.write(b"other")
    assert uri.read(url) == b"halfother"
    assert uri.names(str(tmp_path / "folder")) == ["pieces"]


def test_a_full_disk_is_named_with_what_was_to_be_written(tmp_path: Path) -> None:
    said = r"big: the disk is full \(5,000 bytes to write, .* bytes are free\)"
    with pytest.raises(StorageError, match=said), uri.writing(str(tmp_path / "big"), 5000):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("put", [uri.write, uri.create])
def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path, put: Callable[[str, bytes], object]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/object: .*Not a directory"):
        put(str(tmp_path / "file" / "object"), b"data")


def test_only_one_of_many_creators_wins(tmp_path: Path) -> None:
    url, won = str(tmp_path / "x"), []
    gate = threading.Barrier(8)

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


def test_a_failed_local_write_leaves_the_old_object_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "object")
    uri.write(url, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("the cable was pulled")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StorageError, match=r"object: cannot be written \(the cable was pulled\)"):
        uri.write(url, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["object"]
    assert Path(url).read_bytes() == b"old"


ODD = ("a b", "a#b?c&d", "a%20b", "a+b", "a::b", "file:a", "'a\"", "-a", "./~a", "ä ü", "[a]*", "{a}", "<b>", "\\a")


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_what_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = uri.join(name, "object")
    assert uri.local_path(name) == tmp_path / name
    assert uri.create(url, b"data") is True
    assert (tmp_path / name / "object").read_bytes() == uri.read(uri.absolute(url)) == b"data"
    assert uri.names(name) == ["object"]
    assert [path.name for path in tmp_path.iterdir()] == [Path(name).name]
    uri.remove_tree(name, within=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "the name is empty"),
        ("/a\nb", "line break"),
        ("/a\udcffb", "cannot be printed"),
        ("s3:/bucket/runs", "a URL has ://"),
        ("file:///data/a%20b", "write the path without file://"),
        ("zip://train::file:///data/a?b.zip", "write the path without file://"),
        ("~nobody-of-this-name/a", "home directory"),
    ],
)
def test_a_name_that_would_be_misread_is_refused_in_one_line(url: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as refused:
        uri.filesystem(url)
    assert len(str(refused.value).splitlines()) == 1
    str(refused.value).encode()


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_one_of_many_creators_wins_where_there_are_no_links(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", link)
    url, start = str(tmp_path / "record"), threading.Barrier(8)

    def create(number: int) -> bool:
        start.wait()
        return uri.create(url, b"%d" % number)

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(create, range(8)))
    assert sum(won) == 1
    assert uri.read(url) == b"%d" % won.index(True)
    assert uri.names(str(tmp_path)) == ["record"]


def test_unknown_scheme_is_the_users_error() -> None:
    with pytest.raises(InputError, match="nosuch://user-free/x: not a usable URL"):
        uri.read("nosuch://user-free/x")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/local/path?not#a/query", "/local/path?not#a/query"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("s3://user:secret@bucket/key@2", "s3://bucket/key@2"),
        ("https://host/x?token=secret&y=1", "https://host/x"),
        ("https://me:pa?ss#@host:80/x#frag", "https://host:80/x"),
        ("zip://a::https://host/x.zip?token#frag", "zip://a::https://host/x.zip"),
        ("s3://bucket/C#/what?/C#.tar", "s3://bucket/C#/what?/C#.tar"),
        ("s3://bucket/x.tar?versionId=1/2", "s3://bucket/x.tar"),
        ("s3://bucket/key#token=secret", "s3://bucket/key"),
        ("simplecache::s3://user:secret@bucket/key", "simplecache::s3://bucket/key"),
        ("http://[broken", "http://[broken"),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert uri.redact(url) == shown


def test_a_tree_is_removed_and_its_links_are_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    root = tmp_path / "root"
    (root / "folder" / "deep").mkdir(parents=True)
    (root / "folder" / "deep" / "link").symlink_to(mine)
    assert uri.tree(str(root)) == ["folder/deep/link"]
    uri.remove_tree(str(root / "folder"), str(root))
    assert list(root.iterdir()) == []
    (root / "link").symlink_to(mine)
    with pytest.raises(StorageError, match=r"root/link: a symbolic link to .*mine, and nothing is removed through"):
        uri.remove_tree(str(root / "link" / "file"), str(root))
    uri.remove_tree(str(root / "link"), str(root))
    assert list(root.iterdir()) == []
    assert (mine / "file").read_text() == "mine"


def test_a_pattern_in_a_name_removes_that_name_alone(memory: str) -> None:
    for name in ("a*", "ab", "a[b]"):
        uri.write(uri.join(memory, name, "file"), b"")
    for name in ("a*", "a[b]"):
        uri.remove_tree(uri.join(memory, name), memory)
    assert uri.tree(memory) == ["ab/file"]
