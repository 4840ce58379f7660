import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import packing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.archives import parquets
from storage.archives.open import open_archive
from storage.errors import InputError, StorageError

Rows = list[tuple[bytes | None, str | None, object]]


def put(folder: Path, rows: Rows, names: list[str] | None = None, name: str = "x.parquet") -> str:
    (folder / name).write_bytes(packing.parquet(rows, names))
    return str(folder / name)


def read(url: str) -> dict[str, tuple[int, bytes]]:
    archive = open_archive(url)
    return {member.name: (member.label, archive.read(member)) for member in archive.members}


def test_names_come_from_the_metadata_and_labels_from_their_order(tmp_path: Path) -> None:
    url = put(tmp_path, [(b"1", "x/1.png", 0), (b"2", "2.png", 1)], ["tench, Tinca tinca", "crane"])
    assert read(url) == {"crane/2.png": (0, b"2"), "tench, Tinca tinca/1.png": (1, b"1")}


def test_numbers_and_names_without_metadata(tmp_path: Path) -> None:
    numbers: Rows = [(str(label).encode(), f"{label}.png", label) for label in range(11)]
    assert read(put(tmp_path, numbers)) == {f"{k:02d}/{k}.png": (k, str(k).encode()) for k in range(11)}
    assert read(put(tmp_path, [(b"1", "1.png", "dog"), (b"2", "1.png", "cat")])) == {
        "cat/1.png": (0, b"2"),
        "dog/1.png": (1, b"1"),
    }


@pytest.mark.parametrize("paths", [(None, None), ("1.png", None), ("1.png", "1.png")])
def test_rows_without_paths_of_their_own_are_numbered(tmp_path: Path, paths: tuple[str | None, str | None]) -> None:
    url = put(tmp_path, [(b"1", paths[0], 0), (b"2", paths[1], 0)])
    assert read(url) == {"0/000000000": (0, b"1"), "0/000000001": (0, b"2")}


def test_files_of_a_folder_follow_their_names(tmp_path: Path) -> None:
    put(tmp_path, [(b"3", None, 0)], name="train-00001.parquet")
    put(tmp_path, [(b"1", None, 0), (b"2", None, 1)], name="train-00000.parquet")
    (tmp_path / "README.md").write_text("about")
    assert read(str(tmp_path)) == {
        "0/000000000": (0, b"1"),
        "1/000000001": (1, b"2"),
        "0/000000002": (0, b"3"),
    }


def test_the_digest_follows_labels_and_bytes_of_groups(tmp_path: Path) -> None:
    variants: list[Rows] = [
        [(b"1", "1.png", 0), (b"2", "2.png", 1)],
        [(b"1", "1.png", 1), (b"2", "2.png", 0)],
        [(b"1" * 100, "1.png", 0), (b"2", "2.png", 1)],
        [(b"1", "3.png", 0), (b"2", "2.png", 1)],
    ]
    digests = [open_archive(put(tmp_path, rows)).digest for rows in variants]
    assert len(set(digests)) == 4
    assert open_archive(put(tmp_path, variants[0], name="y.parquet")).digest == digests[0]


def test_row_groups_are_cached_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Rows = [(bytes([number]) * 10_000, f"{number:02d}", 0) for number in range(40)]
    archive = open_archive(put(tmp_path, rows))
    groups, kept = archive._fetch.__self__, []
    reads, read_row_group = [], pq.ParquetFile.read_row_group

    def recorded(self: pq.ParquetFile, number: int, **options: object) -> object:
        reads.append(number)
        return read_row_group(self, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    monkeypatch.setattr(parquets, "CACHE_BYTES", 130_000)  # three groups of four images
    for member in archive.members * 2:
        archive.read(member)
        kept.append(sum(images.nbytes for images in groups._cache.values()))
    assert 80_000 < max(kept) <= 130_000
    assert reads == list(range(10)) * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(archive.read, archive.members * 3))
    assert found == [data for data, _, _ in rows] * 3


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([(b"1", "1", 2)], ["a", "b"], "row group 0: 2 is not a label"),
        ([(b"1", "1", -1)], None, "-1 is not a label"),
        ([(b"1", "1", 0), (b"2", "2", None)], None, "None is not a label"),
        ([(b"1", "1", 0.5)], None, "0.5 is not a label"),
        ([(b"1", "1", 0)], ["a", "a"], "two classes in its metadata have the same name"),
    ],
)
def test_unusable_labels(tmp_path: Path, rows: Rows, names: list[str] | None, message: str) -> None:
    with pytest.raises(InputError, match=rf"x\.parquet.*{message}") as caught:
        open_archive(put(tmp_path, rows, names))
    assert "\n" not in str(caught.value)


Columns = dict[str, list[object]]
ENCODED: list[object] = [{"bytes": b"1", "path": "x/1.png"}, {"bytes": b"2", "path": "x/2.png"}]


def write(path: Path, columns: Columns, classes: dict[str, list[str]] | None = None) -> str:
    features = {name: {"names": names, "_type": "ClassLabel"} for name, names in (classes or {}).items()}
    about = {"huggingface": json.dumps({"info": {"features": features}})} if classes else None
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path)
    return str(path)


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"img": ENCODED, "label": [1, 0]}, {"label": ["cat", "dog"]}),  # CIFAR-10
        ({"img": ENCODED, "fine_label": [1, 0]}, {"fine_label": ["cat", "dog"]}),
        ({"image": ENCODED, "labels": [1, 0], "image_file_path": ["a", "b"]}, {"labels": ["cat", "dog"]}),  # beans
        ({"picture": ENCODED, "species": [1, 0], "class": [7, 7]}, {"species": ["cat", "dog"]}),
        ({"image": ENCODED, "mask": ENCODED[::-1], "class": ["dog", "cat"]}, None),
        ({"image": ENCODED, "label": ["dog", "cat"], "coarse_label": ["animal", "animal"]}, None),
    ],
)
def test_columns_of_other_names(tmp_path: Path, columns: Columns, classes: dict[str, list[str]] | None) -> None:
    expected = {"dog/1.png": (1, b"1"), "cat/2.png": (0, b"2")}
    assert read(write(tmp_path / "x.parquet", columns, classes)) == expected


def test_images_may_be_bytes_alone(tmp_path: Path) -> None:
    url = write(tmp_path / "x.parquet", {"image": [b"1", b"2"], "mask": ENCODED, "label": ["dog", "cat"]})
    assert read(url) == {"dog/000000000": (1, b"1"), "cat/000000001": (0, b"2")}


@pytest.mark.parametrize(
    ("columns", "classes", "message"),
    [
        (
            {"img": ENCODED, "fine_label": [1, 0], "coarse_label": [0, 0]},  # CIFAR-100
            {"fine_label": ["cat", "dog"], "coarse_label": ["animal"]},
            r"several columns of labels, fine_label, coarse_label; name the one to use 'label' \(its columns: img",
        ),
        ({"image": ENCODED, "text": ["a", "b"]}, None, r"no column of labels; name the one to use 'label'"),
        ({"left": ENCODED, "right": ENCODED, "label": [1, 0]}, None, "several columns of encoded images, left, right;"),
        ({"picture": ENCODED, "embedding": [b"1", b"2"], "label": [1, 0]}, None, "several columns of encoded images"),
        (
            {"image": [[1, 2], [3, 4]], "label": [1, 0]},
            None,
            "no column of encoded images; name the one to use 'image'",
        ),
    ],
)
def test_columns_that_cannot_be_told(
    tmp_path: Path, columns: Columns, classes: dict[str, list[str]] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_archive(write(tmp_path / "x.parquet", columns, classes))
    assert "\n" not in str(caught.value)


def test_a_folder_named_parquet_is_what_spark_writes(tmp_path: Path) -> None:
    folder = tmp_path / "train.parquet"
    for number, rows in enumerate([slice(0, 1), slice(1, 2), slice(2, 3)]):  # the last part is empty
        columns = pa.table({"image": ENCODED, "label": ["dog", "cat"]})[rows].to_pydict()
        name = f"part-0000{number}-0000-c000.snappy.parquet"
        write(
            folder / name,
            {
                "image": pa.array(columns["image"], pa.struct({"bytes": pa.binary(), "path": pa.string()})),
                "label": pa.array(columns["label"], pa.string()),
            },
        )
        (folder / f".{name}.crc").write_bytes(b"crc")
    for name in ("_SUCCESS", "._SUCCESS.crc"):
        (folder / name).touch()
    assert (
        read(str(folder))
        == read(f"{folder}/")
        == read(f"{folder}/part-*.parquet")
        == {"dog/1.png": (1, b"1"), "cat/2.png": (0, b"2")}
    )


def test_names_in_the_labels_mix_with_names_in_the_metadata(tmp_path: Path) -> None:
    write(tmp_path / "x/a.parquet", {"image": ENCODED, "label": [1, 0]}, {"label": ["cat", "dog"]})
    write(tmp_path / "x/b.parquet", {"image": [{"bytes": b"3", "path": "3.png"}], "label": ["cat"]})
    assert read(f"{tmp_path}/x") == {"dog/1.png": (1, b"1"), "cat/2.png": (0, b"2"), "cat/3.png": (0, b"3")}


IMAGES = [{"bytes": b"1", "path": "1.png"}, {"bytes": b"2", "path": "2.png"}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": IMAGES, "label": [{"x": 0}, {"x": 1}]}, "the column 'label' holds struct"),
        ({"image": IMAGES, "label": [[0], [1, 2]]}, "the column 'label' holds list"),
        ({"image": [[image] for image in IMAGES], "label": [0, 1]}, "no column of encoded images"),
        ({"image": [{"bytes": None, "path": "1.png"}], "label": [0]}, "no column of encoded images"),
        ({"image": IMAGES, "label": [0, 1], "split": ["train", "test"]}, "'test' and 'train' are splits"),
    ],
)
def test_columns_of_other_kinds_are_refused(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message) as caught:
        open_archive(f"{tmp_path}/x.parquet")
    assert "\n" not in str(caught.value)


def test_rows_of_one_split_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": IMAGES, "label": [0, 1], "split": ["train"] * 2}), tmp_path / "x.parquet")
    assert len(open_archive(f"{tmp_path}/x.parquet").members) == 2


def test_no_rows_are_no_images(tmp_path: Path) -> None:
    table = pq.read_table(put(tmp_path, [(b"1", "1", 0)]))
    pq.write_table(table.slice(0, 0), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no images; put the images of each class"):
        open_archive(f"{tmp_path}/x.parquet")


@pytest.mark.parametrize(("bound", "value"), [("MAX_GROUP", 1000), ("MAX_ROWS", 1)])
def test_a_row_group_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    url = put(tmp_path, [(b"1" * 1000, "1", 0), (b"2" * 1000, "2", 0)])
    monkeypatch.setattr(parquets, bound, value)
    with pytest.raises(
        InputError, match=r"row group 0 has 2 rows with \d,\d{3} bytes of images, more than .* write the file"
    ):
        open_archive(url)


def test_bytes_that_are_stored_once_are_held_once(tmp_path: Path) -> None:
    """A bomb of many rows that all are one large image."""
    (tmp_path / "x.parquet").write_bytes(packing.parquet([(bytes(100_000), None, 0)] * 300, group=300))
    archive = open_archive(f"{tmp_path}/x.parquet")
    assert len(archive.read(archive.members[299])) == 100_000
    assert sum(images.nbytes for images in archive._fetch.__self__._cache.values()) < 200_000


def test_a_row_with_a_path_only_is_found_when_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.parquet: row group 0: 1 of 2 rows have no image bytes; remove them"):
        open_archive(put(tmp_path, [(b"1", "1.png", 0), (None, "2.png", 0)]))


def test_without_statistics_a_row_with_a_path_only_is_named_at_reading(tmp_path: Path) -> None:
    url = put(tmp_path, [(b"1", "1.png", 0), (None, "2.png", 0)])
    pq.write_table(pq.read_table(url), url, write_statistics=False)
    archive = open_archive(url)
    with pytest.raises(StorageError, match=r"0/2\.png: cannot be read \(the row holds no image bytes"):
        archive.read(archive.members[1])


def test_damaged_pages_are_named_at_reading(tmp_path: Path) -> None:
    url = put(tmp_path, [(bytes(range(256)) * 40, "1.png", 0)])
    archive = open_archive(url)
    data = bytearray(Path(url).read_bytes())
    data[4:60] = bytes(56)
    Path(url).write_bytes(data)
    with pytest.raises(StorageError, match=r"x\.parquet/0/1\.png: cannot be read") as caught:
        archive.read(archive.members[0])
    assert "\n" not in str(caught.value)


def test_numbers_do_not_mix_with_names(tmp_path: Path) -> None:
    write(tmp_path / "x/a.parquet", {"image": ENCODED, "label": [1, 0]}, {"label": ["cat", "dog"]})
    write(tmp_path / "x/b.parquet", {"image": ENCODED, "label": [1, 0]})
    with pytest.raises(InputError, match=r"x/b\.parquet: has numbers as classes, and other files have names"):
        open_archive(f"{tmp_path}/x")
