"""Hashes of weights files."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dit.convert.files import read_content
from dit.metrics.npz import Npz
from dit.weights import read_weights, weights_hash
from storage import uri
from storage.errors import InputError


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was hashed: URLs of files read in pieces, and ``bytes``."""
    found, of_file, of_bytes = list[str](), uri.file_sha256, uri.sha256
    monkeypatch.setattr(uri, "file_sha256", lambda url: found.append(url) or of_file(url))
    monkeypatch.setattr(uri, "sha256", lambda data: found.append("bytes") or of_bytes(data))
    return found


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    sha256 = weights_hash(str(file), None)
    assert read_weights(str(file), sha256) == (b"1", sha256)
    assert weights_hash(str(file), sha256) == sha256
    assert hashed == [str(file)]


def test_a_file_that_is_read_first_is_not_read_again_for_its_hash(tmp_path: Path, hashed: list[str]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    _, sha256 = read_weights(str(file), None)
    assert weights_hash(str(file), None) == sha256
    assert hashed == ["bytes"]


def test_another_file_of_the_same_size_and_time_is_noticed(tmp_path: Path, hashed: list[str]) -> None:
    file, other = tmp_path / "weights", tmp_path / "other"
    file.write_bytes(b"1")
    first, times = weights_hash(str(file), None), file.stat()
    other.write_bytes(b"2")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)
    assert weights_hash(str(file), None) != first
    assert hashed == [str(file), str(file)]


def test_what_changes_while_it_is_read_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = tmp_path / "weights", uri.read
    file.write_bytes(b"1")
    first = weights_hash(str(file), None)

    def changed(url: str) -> bytes:
        file.write_bytes(b"22")
        return read(url)

    monkeypatch.setattr(uri, "read", changed)
    data, sha256 = read_weights(str(file), None)
    assert (data, sha256) == (b"22", uri.sha256(b"22"))
    assert sha256 != first
    assert weights_hash(str(file), None) == sha256


READERS: dict[str, Callable[[str], object]] = {
    "x.safetensors": read_content,
    "x.pt": read_content,
    "x.npz": Npz,
    "x.pth": lambda url: read_weights(url, "00"),
    "x.bin": lambda url: weights_hash(url, None),
}


@pytest.mark.parametrize("name", READERS)
def test_what_was_saved_in_the_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(InputError, match=rf"{name}: a Git LFS pointer, not the file itself"):
        READERS[name](f"{tmp_path}/{name}")
