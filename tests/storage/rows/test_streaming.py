import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from row_store import ROWS, contents, fill
from until import LIMIT

from storage import uri
from storage.errors import StorageError
from storage.manifest import Manifest, StageOutput
from storage.order import coins, pooled
from storage.rows.store import ArraySpec, RowLayout, RowReader, RowWriter

CHUNK = 4


@pytest.fixture
def store(memory: str, new_output: Callable[..., StageOutput]) -> Manifest:
    return fill(new_output(memory), contents())


class Requests:
    """What is asked of the store from now on: (path, start, stop)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        cat_file = MemoryFileSystem.cat_file

        def counted(
            fs: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None, **kwargs: object
        ) -> bytes:
            assert self.gate.wait(LIMIT)
            self.ranges.append((path.partition("/data/")[2], start or 0, end or 0))
            return bytes(cat_file(fs, path, start, end, **kwargs))

        monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)

    def of(self, name: str) -> list[tuple[str, int, int]]:
        return [found for found in self.ranges if found[0].startswith(f"{name}/c/")]


def test_rows_are_those_of_a_local_store(store: Manifest, tmp_path: Path) -> None:
    reader, arrays = RowReader(store, tmp_path, streamed=True), contents()
    generator = np.random.default_rng(1)
    indices, flips = generator.integers(0, ROWS, 50), generator.integers(0, 2, 50)
    for _ in range(2):
        assert np.array_equal(reader.take("mean", indices, flips), arrays["mean"][indices, flips])
        assert np.array_equal(reader.take("image", indices), arrays["image"][indices])
        reader.expect("mean", indices[:5], flips[:5])
        reader.expect("image", indices[:5])
        reader.expect("label", indices[:5])
    for name, values in arrays.items():
        found = reader.array(name)
        assert found.dtype == values.dtype
        assert np.array_equal(found, values)
    assert reader.take("mean", indices[:0], flips[:0]).shape == (0, 3, 2, 2)
    with pytest.raises(IndexError, match="data/mean: row 21 is outside 0 to 20"):
        reader.take("mean", np.array([ROWS]), np.array([0]))


def test_nothing_is_copied(store: Manifest, tmp_path: Path) -> None:
    RowReader(store, tmp_path, streamed=True).array("mean")
    assert {path.name for path in tmp_path.iterdir()} == {"trusted"}


def test_an_epoch_fetches_each_chunk_once(
    memory: str, tmp_path: Path, new_output: Callable[..., StageOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, batch = 997, 20  # neither whole chunks nor whole pools
    layout = RowLayout(rows, 32, (ArraySpec("mean", "float32", (2, 3), CHUNK, split_axis0=True),))
    writer = RowWriter(new_output(memory), layout, {})
    values = np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3)
    for block in writer.missing():
        start, stop = writer.bounds(block)
        writer.write(block, {"mean": values[start:stop]})
    manifest = new_output(memory).commit(Manifest, writer.finish())
    reader = RowReader(manifest, tmp_path, streamed=True)
    items = pooled(0, 0, rows, CHUNK)
    flips = coins(0, 0, -(-rows // CHUNK))[items // CHUNK].astype(np.int64)
    requests = Requests(monkeypatch)
    for first in range(0, rows, batch):
        ahead = slice(first // 64 * 64, first // 64 * 64 + 128)
        reader.expect("mean", items[ahead], flips[ahead])
        mine = slice(first, first + batch)
        found = reader.take("mean", items[mine], flips[mine])
        assert np.array_equal(found, values[items[mine], flips[mine]])
        assert len(reader._rows["mean"]._held) <= 3 * 16  # type: ignore[union-attr]
    assert len(requests.ranges) == len(set(requests.ranges)) == -(-rows // CHUNK)
    assert sum(stop - start for _, start, stop in requests.ranges) == 250 * (CHUNK * 12 + 4)


def test_announced_chunks_are_fetched_in_the_background(
    store: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, arrays = RowReader(store, tmp_path, streamed=True), contents()
    requests = Requests(monkeypatch)
    first, second = np.arange(4), np.arange(4, 8)
    reader.take("image", first)
    asked = len(requests.ranges)
    requests.gate.clear()
    reader.expect("image", np.concatenate([first, second]))  # does not wait
    assert np.array_equal(reader.take("image", first), arrays["image"][first])
    requests.gate.set()
    assert np.array_equal(reader.take("image", second), arrays["image"][second])
    assert len(requests.ranges) == asked + 2
    reader.expect("image", second)
    reader.take("image", first)  # was forgotten
    assert len(requests.ranges) == asked + 4


def test_indexes_are_read_once_with_one_request_an_object(
    store: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RowReader(store, tmp_path, streamed=True)
    requests = Requests(monkeypatch)
    reader = RowReader(store, tmp_path, streamed=True)
    assert len(requests.of("mean")) == 6
    assert {stop - start for _, start, stop in requests.of("mean")} == {2 * 16 + 4}
    reader.take("mean", np.arange(ROWS), np.zeros(ROWS, np.int64))
    assert len(requests.of("mean")) == 12


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda data: b"?" + data[1:], "has a damaged chunk at byte 0"),
        (lambda data: data[:20], "cannot be read"),
        (lambda data: None, "cannot be read"),
    ],
)
def test_damage_after_the_start_is_named(
    store: Manifest, tmp_path: Path, change: Callable[[bytes], bytes | None], state: str
) -> None:
    reader, index = RowReader(store, tmp_path, streamed=True), np.arange(8)
    path = "data/mean/c/0/1/0/0/0"
    url = uri.join(store.uri, path)
    data = change(uri.read(url))
    uri.remove_tree(url, store.uri) if data is None else uri.write(url, data)
    reader.take("mean", index, index * 0)
    with pytest.raises(StorageError, match=f"{path}: .*{state}") as caught:
        reader.take("mean", index, index * 0 + 1)
    assert "\n" not in str(caught.value)


def test_an_error_in_the_background_surfaces(store: Manifest, tmp_path: Path) -> None:
    reader, index = RowReader(store, tmp_path, streamed=True), np.arange(8)
    uri.remove_tree(uri.join(store.uri, "data/mean/c/0/1/0/0/0"), store.uri)
    reader.expect("mean", index, index * 0 + 1)
    with pytest.raises(StorageError, match="data/mean/c/0/1/0/0/0: bytes .* cannot be read"):
        reader.take("mean", index, index * 0 + 1)
