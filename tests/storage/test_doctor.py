"""The checks of a root, its clock and the cache: on a disk, on S3, and on stores that break a promise."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from machine import give_cores
from s3_endpoint import BUCKET, s3_server

from storage import doctor
from storage.errors import StorageError


class Careless(MemoryFileSystem):
    """A store that overwrites what exists, as some do that call themselves like S3."""

    protocol = "careless"
    store: dict[str, Any] = {}  # noqa: RUF012  as fsspec has it

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode="overwrite", **kwargs)


class Late(MemoryFileSystem):
    """A store whose clock is behind."""

    protocol = "late"
    store: dict[str, Any] = {}  # noqa: RUF012
    behind = timedelta(0)

    def modified(self, path: str) -> datetime:
        return datetime.now(UTC) - self.behind


class Timeless(MemoryFileSystem):
    """A store that keeps no times."""

    protocol = "timeless"
    store: dict[str, Any] = {}  # noqa: RUF012

    def modified(self, path: str) -> datetime:
        raise NotImplementedError


for kind in (Careless, Late, Timeless):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as env, mock.patch.dict(os.environ, env):
        yield f"s3://{BUCKET}/root"


def test_a_disk_is_a_root_and_keeps_nothing_of_the_check(tmp_path: Path) -> None:
    found = doctor.root(str(tmp_path / "new"))
    assert found.state == "ok"
    assert "creates exclusively" in found.seen
    assert doctor.clock(str(tmp_path / "new")).state == "ok"
    assert list((tmp_path / "new").iterdir()) == []


def test_s3_is_a_root_and_keeps_nothing_of_the_check(s3: str) -> None:
    found = doctor.root(s3)
    assert found.state == "ok"
    assert found.seen.startswith(f"{s3}: creates exclusively")
    assert doctor.clock(s3).state == "ok"
    fs, path = fsspec.core.url_to_fs(s3)
    assert fs.find(path) == []


def test_a_store_that_creates_what_exists_is_no_root() -> None:
    found = doctor.root("careless://root")
    assert found.state == "failed"
    assert "can be created again" in found.seen
    assert "another root" in found.to_do
    assert Careless.store == {}


def test_a_file_in_the_place_of_the_root_is_explained(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("no folder")
    with pytest.raises(StorageError, match=r"root.*cannot be written"):
        doctor.root(str(tmp_path / "root"))


def test_a_full_disk_is_said_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_BYTES", 10**18)
    found = doctor.root(str(tmp_path))
    assert found.state == "warning"
    assert "make room" in found.to_do


@pytest.mark.parametrize(
    ("behind", "state"),
    [(timedelta(0), "ok"), (timedelta(minutes=2), "warning"), (timedelta(hours=2), "failed")],
)
def test_a_clock_that_differs(monkeypatch: pytest.MonkeyPatch, behind: timedelta, state: str) -> None:
    monkeypatch.setattr(Late, "behind", behind)
    assert doctor.clock("late://root").state == state


def test_a_store_without_times_has_no_clock() -> None:
    assert doctor.clock("timeless://root").state == "skipped"


def test_the_cache_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "TRIAL_BYTES", 1000)
    monkeypatch.setattr(doctor, "SLOW_CACHE", 0)
    assert "MB/s" in doctor.cache_disk().seen
    assert list((tmp_path / "ditflow").iterdir()) == []


def test_a_slow_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SLOW_CACHE", 1e18)
    found = doctor.cache_disk()
    assert found.state == "warning"
    assert "XDG_CACHE_HOME" in found.to_do


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ditflow").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(StorageError, match="set XDG_CACHE_HOME"):
        doctor.cache_disk()


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    give_cores(monkeypatch, 3)
    assert doctor.machine().seen.startswith("3 cores, ")
