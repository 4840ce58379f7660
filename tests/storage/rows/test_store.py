from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from row_store import LAYOUT, ROWS, contents, fill, resized

from storage import uri
from storage.errors import InputError, StorageError
from storage.header import Parent
from storage.manifest import Manifest, StageOutput
from storage.rows.store import ArraySpec, RowLayout, RowReader, RowWriter
from storage.verify import faults


@pytest.fixture
def store(tmp_path: Path, new_output: Callable[..., StageOutput]) -> Manifest:
    return fill(new_output(tmp_path), contents())


def test_whole_arrays_come_back(store: Manifest) -> None:
    reader = RowReader(store)
    assert len(reader) == ROWS
    assert reader.attributes == {"made_by": "a test"}
    for name, values in contents().items():
        found = reader.array(name)
        assert found.dtype == values.dtype
        assert np.array_equal(found, values)


def test_plain_zarr_reads_the_same(store: Manifest) -> None:
    group = zarr.open_group(f"{store.uri}/data", mode="r")
    for name, values in contents().items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert np.array_equal(array[:], values)
    assert group["mean"].shards == (8, 1, 3, 2, 2)
    assert group["mean"].chunks == (4, 1, 3, 2, 2)
    assert np.isnan(group["mean"].fill_value)
    assert group["label"].fill_value == -1
    assert group["image"].fill_value == 0


def test_objects_are_one_for_each_block_and_flip(store: Manifest) -> None:
    paths = {entry.path for entry in store.files}
    shards = {path for path in paths if path.startswith("data/mean/c/")}
    assert shards == {f"data/mean/c/{block}/{flip}/0/0/0" for block in range(3) for flip in range(2)}
    assert {"data/zarr.json", "data/mean/zarr.json", "records/rows-00002.json"} <= paths


def test_rows_in_any_order_with_any_flip(store: Manifest) -> None:
    reader, arrays = RowReader(store), contents()
    generator = np.random.default_rng(1)
    indices = generator.integers(0, ROWS, 50)
    flips = generator.integers(0, 2, 50)
    assert np.array_equal(reader.take("mean", indices, flips), arrays["mean"][indices, flips])
    assert np.array_equal(reader.take("mean", indices), arrays["mean"][indices])
    assert np.array_equal(reader.take("image", indices), arrays["image"][indices])
    assert np.array_equal(reader.take("label", indices), arrays["label"][indices])
    none = reader.take("mean", indices[:0], flips[:0])
    assert none.shape == (0, 3, 2, 2)
    assert none.dtype == np.float16


def test_rows_outside_the_store_are_refused(store: Manifest) -> None:
    reader, zero = RowReader(store), np.zeros(1, np.int64)
    for bad in (-1, ROWS):
        with pytest.raises(IndexError, match=f"{store.uri}/data/label: row {bad} is outside 0 to 20"):
            reader.take("label", np.array([0, bad]))
    for bad in (-1, 2):
        with pytest.raises(IndexError, match=f"{store.uri}/data/mean: first-axis index {bad} is outside 0 to 1"):
            reader.take("mean", zero, zero + bad)
    with pytest.raises(ValueError, match="broadcast"):
        reader.take("mean", np.zeros(2, np.int64), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="the first axis of 'image' is not split"):
        reader.take("image", zero, zero)
    with pytest.raises(KeyError, match="std"):
        reader.array("std")


def test_values_equal_to_the_fill_value_are_written(tmp_path: Path, new_output: Callable[..., StageOutput]) -> None:
    arrays = {
        "mean": np.full((ROWS, 2, 3, 2, 2), np.nan, np.float16),
        "image": np.zeros((ROWS, 5, 4, 3), np.uint8),
        "label": np.full(ROWS, -1, np.int32),
    }
    reader = RowReader(fill(new_output(tmp_path), arrays))
    assert np.isnan(reader.array("mean")).all()
    assert np.array_equal(reader.array("image"), arrays["image"])


def test_a_writer_reads_its_blocks_before_the_manifest(tmp_path: Path, new_output: Callable[..., StageOutput]) -> None:
    out, arrays = new_output(tmp_path), contents()
    Path(fill(out, arrays).url).unlink()
    writer = RowWriter(out, LAYOUT, {"made_by": "a test"})
    for name in ("image", "label"):
        assert np.array_equal(writer.array(name), arrays[name])
    (Path(out.uri) / "data/label/c/1").unlink()
    with pytest.raises(StorageError, match="data/label/c/1"):
        writer.array("label")


def test_only_missing_blocks_are_written_again(tmp_path: Path, new_output: Callable[..., StageOutput]) -> None:
    out, arrays = new_output(tmp_path), contents()
    whole = fill(out, arrays)
    Path(whole.url).unlink()
    folder = Path(out.uri)
    (folder / "data/mean/c/0/1/0/0/0").unlink()
    (folder / "records/rows-00002.json").write_text("{")
    writer = RowWriter(out, LAYOUT, {"made_by": "a test"})
    assert writer.missing() == [0, 2]
    with pytest.raises(StorageError, match=r"rows-00000\.json: not committed; run the same command again"):
        writer.finish()
    again = fill(out, arrays)
    assert again.files == whole.files
    assert not faults(again, full=True)


def test_blocks_of_another_parent_are_written_again(tmp_path: Path, new_output: Callable[..., StageOutput]) -> None:
    parents = [Parent(digest="0" * 64, uri="/parent", content=f"{number}" * 64) for number in (1, 2)]
    out = new_output(tmp_path)
    before, after = (
        out.model_copy(update={"header": out.header.model_copy(update={"parents": {"shards": parent}})})
        for parent in parents
    )
    fill(before, contents())
    assert RowWriter(before, LAYOUT, {}).missing() == []
    assert RowWriter(after, LAYOUT, {}).missing() == [0, 1, 2]


def test_blocks_may_be_written_in_any_order_by_several_writers(
    tmp_path: Path, new_output: Callable[..., StageOutput]
) -> None:
    arrays = contents()
    first = fill(new_output(tmp_path / "a"), arrays)
    out = new_output(tmp_path / "b")
    for block in (2, 0, 1):
        writer = RowWriter(out, LAYOUT, {"made_by": "a test"})
        start, stop = writer.bounds(block)
        writer.write(block, {name: values[start:stop] for name, values in arrays.items()})
    assert out.commit(Manifest, RowWriter(out, LAYOUT, {"made_by": "a test"}).finish()).files == first.files


def test_another_run_with_other_bytes_is_noticed(
    tmp_path: Path, new_output: Callable[..., StageOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arrays = new_output(tmp_path), contents()
    create = uri.create

    def late(url: str, data: bytes) -> bool:
        create(url, data.replace(b'"sha256":"', b'"sha256":"0', 1))
        return create(url, data)

    monkeypatch.setattr(uri, "create", late)
    with pytest.raises(StorageError, match=r"rows-00000\.json: another run committed other bytes at the same time"):
        fill(out, arrays)


def test_a_block_must_be_what_the_layout_says(tmp_path: Path, new_output: Callable[..., StageOutput]) -> None:
    writer, arrays = RowWriter(new_output(tmp_path), LAYOUT, {}), contents()
    block = {name: values[:8] for name, values in arrays.items()}
    wrong = [
        {**block, "label": block["label"].astype(np.int64)},
        {**block, "image": block["image"][:7]},
        {name: block[name] for name in ("mean", "image")},
    ]
    for given in wrong:
        with pytest.raises(ValueError, match="the block needs the arrays"):
            writer.write(0, given)
    assert writer.missing() == [0, 1, 2]


def test_a_block_is_made_of_whole_chunks() -> None:
    with pytest.raises(InputError, match="block_rows = 10 is not a multiple of chunk_rows = 4"):
        RowLayout(rows=3, block_rows=10, arrays=(ArraySpec("x", "int8", (), chunk_rows=4),))


def test_a_truncated_shard_is_named_even_if_the_manifest_agrees(store: Manifest) -> None:
    path = "data/mean/c/1/0/0/0/0"
    data = (Path(store.uri) / path).read_bytes()
    for size in (1, 30, len(data) - 5):
        with pytest.raises(StorageError, match="mean/c/1/0/0/0/0: the shard index is damaged"):
            RowReader(resized(store, path, data[:size]))
    with pytest.raises(StorageError, match="mean/c/1/0/0/0/0: cannot be mapped"):
        RowReader(resized(store, path, b""))
    with pytest.raises(StorageError, match="mean/c/1/0/0/0/0: the shard index does not fit the object"):
        RowReader(resized(store, path, data[-36:]))


def test_a_chunk_that_is_longer_than_its_object_is_named(store: Manifest) -> None:
    path = "data/label/c/1"  # of one chunk, which begins at 0
    data = (Path(store.uri) / path).read_bytes()
    for size in (20, len(data) - 1):
        with pytest.raises(StorageError, match="label/c/1: the shard index does not fit the object"):
            RowReader(resized(store, path, data[-size:]))


def test_a_missing_inner_chunk_is_named(store: Manifest) -> None:
    """Plain zarr leaves out chunks that equal the fill value and reads them as if they were data."""
    with zarr.config.set({"array.write_empty_chunks": False}):
        group = zarr.open_group(f"{store.uri}/data", mode="r+")
        group["mean"][4:8] = np.nan
    path = "data/mean/c/0/1/0/0/0"
    for other in ("data/mean/c/0/0/0/0/0", path):
        store = resized(store, other, (Path(store.uri) / other).read_bytes())
    with pytest.raises(StorageError, match=r"data/mean/c/0/./0/0/0: an inner chunk is missing"):
        RowReader(store)


def test_a_store_of_another_kind_is_refused(tmp_path: Path, new_output: Callable[..., StageOutput]) -> None:
    out = new_output(tmp_path)
    group = zarr.open_group(out.url("data"), mode="w", zarr_format=3)
    group.create_array("label", data=np.arange(4), chunks=(2,))
    folder = Path(out.uri)
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    manifest = out.commit(Manifest, [out.put(path, (folder / path).read_bytes()) for path in paths])
    with pytest.raises(StorageError, match="data/label: not a row store; its chunks must be sharded, uncompressed"):
        RowReader(manifest)


def test_a_low_limit_of_open_files_is_an_error(store: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (64, 64))
    with pytest.raises(StorageError, match="12 shard objects to map but only 64 open files allowed"):
        RowReader(store)
