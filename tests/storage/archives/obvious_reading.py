"""A slow and obvious reading of archives by the standard library and pyarrow, without the code that it judges."""

import io
import json
import os
import stat
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from random_archives import Part

SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass
class Reading:
    """What is in an archive."""

    images: list[tuple[str, str | None, bytes]] = field(default_factory=list)
    """Class, name below the class if it has one, and bytes of each file that has a class."""
    passed: Counter[str] = field(default_factory=Counter)
    """Everything else: how many entries by the first word of the reason."""


Items = list[tuple[str, bytes | None]]
"""Path and bytes of every file, or None in place of the bytes of what is no file."""


def is_usable(data: bytes) -> bool:
    """Whether Pillow reads all of an image, of a format that is supported, and it has eight pixels each way."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except Exception:
        return False
    return min(image.size) >= 8


def _items_of_folder(root: Path) -> Items:
    items: Items = []
    for folder, _, files in os.walk(root, followlinks=True):
        for name in files:
            path = Path(folder, name)
            regular = stat.S_ISREG(path.stat().st_mode)
            items.append((str(path.relative_to(root)), path.read_bytes() if regular else None))
    return items


def _items_of_tar(path: Path | io.BytesIO) -> Items:
    items: Items = []
    with tarfile.open(**({"name": path} if isinstance(path, Path) else {"fileobj": path})) as opened:
        for info in opened.getmembers():
            name = info.name.removeprefix("./")
            if info.isreg():
                content = opened.extractfile(info)
                assert content is not None
                items.append((name, content.read()))
            elif not info.isdir():
                items.append((name, None))
    return items


def _seen(items: Items, reading: Reading) -> Items:
    """Without what is hidden or made by a system, which counts once for each hidden folder."""
    unseen, seen = set(), []
    for path, data in items:
        parts = path.split("/")
        marks = [part.startswith(".") or part.lower() in SYSTEM for part in parts]
        if any(marks):
            first = marks.index(True)
            unseen.add(("hidden" if parts[first].startswith(".") else "made", "/".join(parts[: first + 1])))
        elif data is None:
            reading.passed["neither"] += 1
        else:
            seen.append((path, data))
    reading.passed.update(reason for reason, _ in unseen)
    return seen


def _is_image_name(path: str) -> bool:
    return path.rpartition(".")[2].lower() in IMAGES


def _outside(path: str, reading: Reading) -> None:
    reading.passed["image" if _is_image_name(path) else "file"] += 1


def _class_folders(items: Items) -> Reading:
    """Classes are the first folders that are several, side by side; or a single one that has images itself."""
    reading = Reading()
    seen = _seen(items, reading)
    depth = 0
    while True:
        deeper = [path.split("/") for path, _ in seen if path.count("/") > depth]
        here = {parts[depth] for parts in deeper}
        images = [parts for parts in deeper if len(parts) == depth + 2 and _is_image_name(parts[-1])]
        if len(here) > 1 or images:
            break
        depth += 1
    for path, data in seen:
        parts = path.split("/")
        if len(parts) > depth + 1:
            assert data is not None
            reading.images.append((parts[depth], "/".join(parts[depth + 1 :]), data))
        else:
            _outside(path, reading)
    return reading


def _class_tars(items: Items) -> Reading:
    reading = Reading()
    for path, data in _seen(items, reading):
        name = path.rpartition("/")[2]
        if not name.endswith(".tar"):
            _outside(path, reading)
            continue
        assert data is not None
        for inside, content in _seen(_items_of_tar(io.BytesIO(data)), reading):
            assert content is not None
            reading.images.append((name.removesuffix(".tar"), inside, content))
    return reading


def folder(part: Part) -> Reading:
    """A folder of class folders."""
    return _class_folders(_items_of_folder(part.paths[0]))


def tar(part: Part) -> Reading:
    """A tar of class folders."""
    return _class_folders(_items_of_tar(part.paths[0]))


def zipped(part: Part) -> Reading:
    """A zip of class folders, or a folder of it."""
    inside = part.url.rpartition("::")[0].removeprefix("zip://")
    top = f"{inside}/" if inside else ""
    with zipfile.ZipFile(part.paths[0]) as opened:
        infos = [info for info in opened.infolist() if not info.is_dir() and info.filename.startswith(top)]
        return _class_folders([(info.filename.removeprefix(top), opened.read(info)) for info in infos])


def folder_of_class_tars(part: Part) -> Reading:
    """A folder of tars, one a class."""
    return _class_tars(_items_of_folder(part.paths[0]))


def tar_of_class_tars(part: Part) -> Reading:
    """A tar of tars, one a class."""
    return _class_tars(_items_of_tar(part.paths[0]))


def samples(part: Part) -> Reading:
    """Webdataset tars."""
    reading = _beside(part)
    found = [(path.stem, *sample) for path in part.paths for sample in _samples(path, reading)]
    numbers = all(label.isdecimal() for _, label, _, _ in found)
    width = max(len(str(int(label))) for _, label, _, _ in found) if numbers else 0
    anew = len({(label, name) for _, label, name, _ in found}) < len(found)
    for stem, label, name, data in found:
        class_name = str(int(label)).zfill(width) if numbers else label
        reading.images.append((class_name, f"{stem}/{name}" if anew else name, data))
    return reading


def _samples(path: Path, reading: Reading) -> list[tuple[str, str, bytes]]:
    """Label, name and bytes of each image in a tar."""
    fields: dict[str, dict[str, bytes]] = {}
    for name, data in _seen(_items_of_tar(path), reading):
        folder, _, file = name.rpartition("/")
        key, _, ending = file.partition(".")
        assert data is not None
        fields.setdefault(f"{folder}/{key}", {})[ending] = data
        if ending == "" or ending.lower() not in ("cls", *IMAGES):
            reading.passed["field" if (folder, key) != ("", "README") else "neither"] += 1
    found = []
    for key, sample in fields.items():
        for ending, data in sample.items():
            if ending.lower() in IMAGES:
                found.append((sample["cls"].decode("utf-8-sig").strip(), f"{key}.{ending}".lstrip("/"), data))
    return found


def _beside(part: Part) -> Reading:
    """What lies beside the files of a folder."""
    reading = Reading()
    for path, _ in _seen([(name, b"") for name in part.beside], reading):
        _outside(path, reading)
    return reading


def parquet(part: Part) -> Reading:
    """Parquet files."""
    reading, (image, label) = _beside(part), part.columns
    rows, names = [], None
    for path in part.paths:
        table = pq.read_table(path)
        about = (table.schema.metadata or {}).get(b"huggingface")
        names = json.loads(about)["info"]["features"][label]["names"] if about else None
        for row in table.to_pylist():
            data = row[image] if isinstance(row[image], bytes) else row[image]["bytes"]
            rows.append((names[row[label]] if names else str(row[label]), data))
    numbers = all(class_name.isdecimal() for class_name, _ in rows)
    width = max(len(class_name) for class_name, _ in rows)
    reading.images = [(name.zfill(width) if numbers else name, None, data) for name, data in rows]
    return reading


def listed(part: Part) -> Reading:
    """Images alone, with a list of their classes."""
    reading = Reading()
    assert part.labels is not None
    text = part.labels.read_bytes()
    lines = text.decode("utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").splitlines()
    for line, (path, data) in zip(lines, sorted(_seen(_items_of_tar(part.paths[0]), reading)), strict=True):
        assert data is not None
        reading.images.append((line, path, data))
    return reading
