"""The same images in every form that an archive may have."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Files = Mapping[str, bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def by_class(files: Files) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for name, data in files.items():
        class_name, _, path = name.partition("/")
        found.setdefault(class_name, {})[path] = data
    return found


def tar(files: Files, form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def class_tars(files: Files) -> dict[str, bytes]:
    return {f"{name}.tar": tar(inside) for name, inside in by_class(files).items()}


def sample_tars(files: Files, labels: Mapping[str, str]) -> dict[str, bytes]:
    """A tar of webdataset samples for each class, labelled as ``labels`` says."""
    found = {}
    for number, (name, inside) in enumerate(by_class(files).items()):
        texts = {f"{Path(path).stem}.cls": labels[name].encode() for path in inside}
        found[f"part-{number:03d}.tar"] = tar(dict(sorted({**inside, **texts}.items())))
    return found


def zipped(files: Files, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return buffer.getvalue()


def parquet(
    rows: Sequence[tuple[bytes | None, str | None, object]], names: Sequence[str] | None = None, group: int = 4
) -> bytes:
    """Rows of (bytes, path, label), with class names in the metadata as Hugging Face's library has them."""
    images = [{"bytes": data, "path": path} for data, path, _ in rows]
    table = pa.table({"image": images, "label": [label for *_, label in rows]})
    if names is not None:
        about = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group)
    return buffer.getvalue()


def parquet_of(files: Files, group: int = 4) -> bytes:
    inside = by_class(files)
    names = sorted(inside, reverse=True)  # labels in an order that is not that of the names
    rows = [(data, path, names.index(name)) for name, found in inside.items() for path, data in found.items()]
    return parquet(rows, names, group)
