import errno
import fcntl
import itertools
import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from row_store import ROWS, contents, fill
from until import LIMIT, until

from storage import uri
from storage.errors import StorageError
from storage.manifest import Manifest, StageOutput
from storage.rows import cache, staging
from storage.rows.format import stored_arrays
from storage.rows.store import RowReader

OBJECTS = 12


@pytest.fixture
def store(memory: str, new_output: Callable[..., StageOutput]) -> Manifest:
    return fill(new_output(memory), contents())


def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The chunks' objects that are read from now on."""
    paths: list[str] = []
    read = Manifest.read_object

    def counted(manifest: Manifest, path: str) -> bytes:
        if not path.endswith("zarr.json"):
            paths.append(path)
        return read(manifest, path)

    monkeypatch.setattr(Manifest, "read_object", counted)
    return paths


def same(reader: RowReader) -> bool:
    return all(np.array_equal(reader.array(name), values) for name, values in contents().items())


def folder(tmp_path: Path) -> Path:
    (found,) = (path for path in (tmp_path / "staged").iterdir() if path.is_dir())
    return found


def test_a_copy_is_made_once_and_is_flat(store: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = fetched(monkeypatch)
    assert same(RowReader(store, tmp_path))
    assert len(paths) == len(set(paths)) == OBJECTS
    assert same(RowReader(store, tmp_path))
    assert len(paths) == OBJECTS
    flat = np.memmap(folder(tmp_path) / "mean.rows", "<f2", "r").reshape(2, ROWS, 3, 2, 2)
    assert np.array_equal(flat.swapaxes(0, 1), contents()["mean"])
    assert (folder(tmp_path) / "label.rows").read_bytes() == contents()["label"].astype("<i4").tobytes()


def test_stores_of_the_same_bytes_share_a_copy(
    store: Manifest, tmp_path: Path, new_output: Callable[..., StageOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    RowReader(store, tmp_path)
    again = fill(new_output("memory://root/elsewhere"), contents())
    paths = fetched(monkeypatch)
    assert same(RowReader(again, tmp_path))
    assert not paths


@pytest.mark.parametrize("done", [0, 1, 5, 11])
def test_an_interrupted_copy_resumes(
    store: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    monkeypatch.setattr(staging, "WORKERS", 1)
    read, count = Manifest.read_object, iter(range(100))

    def failing(manifest: Manifest, path: str) -> bytes:
        if not path.endswith("zarr.json") and next(count) >= done:
            raise StorageError("the network is gone")
        return read(manifest, path)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "read_object", failing)
        with pytest.raises(StorageError, match="the network is gone"):
            RowReader(store, tmp_path)
    assert not (folder(tmp_path) / staging.DONE).exists()
    paths = fetched(monkeypatch)
    assert same(RowReader(store, tmp_path))
    assert len(paths) == OBJECTS - done


def test_a_torn_journal_or_a_lost_file_only_costs_time(
    store: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RowReader(store, tmp_path)
    copy = folder(tmp_path)
    (copy / staging.DONE).unlink()
    journal = copy / staging.JOURNAL
    journal.write_text(journal.read_text()[:-4])
    paths = fetched(monkeypatch)
    assert same(RowReader(store, tmp_path))
    assert len(paths) == 1
    (copy / staging.DONE).unlink()
    (copy / "image.rows").unlink()
    assert same(RowReader(store, tmp_path))
    assert len(paths) == 1 + OBJECTS


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"?" + data[1:], lambda data: None])
def test_a_copy_that_was_changed_is_made_again(
    store: Manifest, tmp_path: Path, change: Callable[[bytes], bytes | None]
) -> None:
    RowReader(store, tmp_path)
    path = folder(tmp_path) / "mean.rows"
    data = change(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    assert same(RowReader(store, tmp_path))


def test_a_copy_whose_bits_flip_is_mended_at_a_start_that_compares_it(
    store: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    RowReader(store, tmp_path)
    monkeypatch.setattr(uri, "version", lambda url: {"size": "the same"})  # as on a disk whose bits flip
    copy = folder(tmp_path)
    uri.write(str(copy / staging.DONE), json.dumps(staging._versions(copy, stored_arrays(store)[1])).encode())
    paths = fetched(monkeypatch)
    assert same(RowReader(store, tmp_path, start="a"))
    assert not paths
    flat = (copy / "mean.rows").read_bytes()
    (copy / "mean.rows").write_bytes(flat[:-1] + bytes([flat[-1] ^ 1]))
    for start in (None, "a"):
        assert not same(RowReader(store, tmp_path, start=start))
    assert same(RowReader(store, tmp_path, start="b"))
    assert paths == ["data/mean/c/2/1/0/0/0"]
    assert caplog.messages == [f"{copy}: bits of the copy of {paths[0]} have changed; copying it again"]


def test_a_full_disk_is_an_error_before_anything_is_copied(
    store: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(values.nbytes for values in contents().values())
    paths = fetched(monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(
        StorageError, match=r"staged/\w+: no room for a copy of memory://.*GB needed, .*GB free; .*XDG_CACHE_HOME"
    ) as caught:
        RowReader(store, tmp_path)
    assert "\n" not in str(caught.value)
    assert not paths
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    assert same(RowReader(store, tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"a file system may not be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_copying_is_a_one_line_error(
    store: Manifest, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging._Staging, "_check_room", lambda *_: None)
    (small_disk / "other").write_bytes(b"." * 16384)
    with pytest.raises(StorageError, match=r"cannot be written .*No space.*run the same command again"):
        RowReader(store, small_disk)
    (small_disk / "other").unlink()


def test_a_damaged_object_never_reaches_the_copy(store: Manifest, tmp_path: Path) -> None:
    path = uri.join(store.uri, "data/label/c/0")
    whole = uri.read(path)
    uri.write(path, b"?" + whole[1:])
    with pytest.raises(StorageError, match="data/label/c/0: does not hold the bytes"):
        RowReader(store, tmp_path)
    assert "data/label/c/0" not in (folder(tmp_path) / staging.JOURNAL).read_text().splitlines()
    uri.write(path, whole)
    assert same(RowReader(store, tmp_path))


def stage(root: str, cache_folder: str, log: str, processes: int = 1, killed_at: int | None = None) -> bool:
    """In a process of its own: stage a store as if it were not local, and note what is fetched.

    The first fetch waits until all processes are here; one that is to be killed fetches object by object.
    """
    manifest = Manifest.read(root)
    read, fetches = Manifest.read_object, itertools.count(1)
    Path(f"{log}-{os.getpid()}").touch()

    def noted(manifest: Manifest, path: str) -> bytes:
        until(lambda: len(list(Path(log).parent.glob("log-*"))) >= processes)
        if next(fetches) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(log).open("a") as file:
            file.write(f"{path}\n")
        return read(manifest, path)

    Manifest.read_object = noted  # type: ignore[method-assign]
    staging.WORKERS = 1 if killed_at else 4
    _, arrays = stored_arrays(manifest)
    rows = staging.staged(manifest, arrays, Path(cache_folder))
    index = np.arange(ROWS)
    return np.array_equal(rows["label"].take(index, index * 0), contents()["label"])


def test_processes_of_a_machine_share_the_work(tmp_path: Path, new_output: Callable[..., StageOutput]) -> None:
    store = fill(new_output(tmp_path), contents())
    log = tmp_path / "log"
    with get_context("spawn").Pool(2) as pool:
        assert all(pool.starmap(stage, [(store.uri, str(tmp_path / "cache"), str(log), 2)] * 2))
    fetched = [path for path in log.read_text().splitlines() if "/c/" in path]
    assert len(fetched) == len(set(fetched)) == OBJECTS


def test_a_killed_copy_resumes(tmp_path: Path, new_output: Callable[..., StageOutput]) -> None:
    store, log = fill(new_output(tmp_path), contents()), tmp_path / "log"
    arguments = (store.uri, str(tmp_path / "cache"), str(log))
    process = get_context("spawn").Process(target=stage, args=(*arguments, 1, 9))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.rglob(staging.DONE))
    (journal,) = tmp_path.rglob(staging.JOURNAL)
    done = journal.read_text().count("\n")
    assert 0 < done < OBJECTS
    log.unlink()
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(stage, arguments)
    assert len([path for path in log.read_text().splitlines() if "/c/" in path]) == OBJECTS - done
    assert np.array_equal(
        np.fromfile(folder(tmp_path / "cache") / "mean.rows", "<f2").reshape(2, ROWS, 3, 2, 2).swapaxes(0, 1),
        contents()["mean"],
    )


def test_where_there_are_no_locks_work_goes_on_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre without flock refuses to unlock, too."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with cache.locked(tmp_path / "copy"):
        pass
    assert "copy.lock: no locks here (Function not implemented); do not start two commands at once" in caplog.text


def test_a_waiting_process_logs_what_it_waits_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    order: list[str] = []

    def second() -> None:
        with cache.locked(tmp_path / "copy"):
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        with cache.locked(tmp_path / "copy"):
            waiting = pool.submit(second)
            until(lambda: caplog.messages)
            order.append("first")
        waiting.result(LIMIT)
    assert order == ["first", "second"]
    assert caplog.messages == [f"waiting for another process that is preparing {tmp_path / 'copy'}"]


def test_the_record_of_a_copy_is_its_files_versions(store: Manifest, tmp_path: Path) -> None:
    RowReader(store, tmp_path)
    record = json.loads((folder(tmp_path) / staging.DONE).read_bytes())
    assert record.keys() == {"mean", "image", "label"}
    assert record["mean"]["size"] == str(contents()["mean"].nbytes)


def test_an_output_is_made_where_no_cache_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with cache.making(str(tmp_path / "output")):
        (said,) = caplog.messages
    assert "cannot be written" in said
    assert said.endswith("do not let two commands make the same output at once")
