import errno
import hashlib
import threading
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
