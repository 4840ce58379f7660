"""Random class tars, webdataset tars, Parquet files and images with a list of labels; and cases of all archives.

Each case follows from its seed.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from random_archives import (
    NAMES,
    PAGE,
    POINTER,
    REGULAR,
    Entries,
    Images,
    Part,
    folder,
    picture,
    random_images,
    tar,
    tar_of,
    zipped,
)

KEYS = ("%06d", "ü%d", "a b %d", "sub/%d", "sub/deep/%d", "#%d?", "x" * 120 + "%d")
OTHER_SPLIT = "val-00000"
OTHERS = (".json", ".txt", ".mask.png", ".caption", "")
Rows = list[tuple[bytes | None, object]]


def class_tars(rng: random.Random, root: Path, images: Images, flaw: bool) -> Part:
    """A tar for each class, in a folder or in a tar."""
    tars = {}
    for name, found in images.items():
        files = {f"{rng.choice(['', '', 'sub/'])}{rng.choice(NAMES) % k}": data for k, data in enumerate(found)}
        hidden = [(".DS_Store", REGULAR, b"litter")] if rng.random() < 0.2 else []
        tars[f"{name}.tar"] = tar_of(rng, [*((path, REGULAR, data) for path, data in files.items()), *hidden])
    refused = None
    if flaw:
        refused, data = rng.choice(
            [
                ("nothing.tar", tar_of(rng, [])),
                ("inner.zip", tar_of(rng, [("1.png", REGULAR, picture(rng)), ("sub/inner.zip", REGULAR, b"packed")])),
                ("link.png", tar_of(rng, [("link.png", tarfile.SYMTYPE, b"target")])),
                ("1.txt", tar_of(rng, [("1.png", REGULAR, picture(rng)), ("1.txt", REGULAR, b"a fox")])),
                ("more.tar", POINTER),
                ("more.tar", tar_of(rng, [("1.png", REGULAR, picture(rng))])[:700]),
            ]
        )
        tars["nothing.tar" if refused == "nothing.tar" else "more.tar"] = data
    beside = dict.fromkeys(rng.sample(["README.md", ".DS_Store", "cover.png", "Thumbs.db"], 2), b"litter")
    if rng.random() < 0.5:
        root.mkdir()
        for name, data in (tars | beside).items():
            (root / name).write_bytes(data)
        return Part(str(root), "folder_of_class_tars", [root], images, refused)
    around, path = "" if "cover.png" in beside else rng.choice(["", "train/"]), root.with_suffix(".tar")
    entries = [(f"{around}{name}", REGULAR, data) for name, data in (tars | beside).items()]
    path.write_bytes(tar_of(rng, entries))
    return Part(str(path), "tar_of_class_tars", [path], images, refused)


def samples(rng: random.Random, root: Path, images: Images, flaw: bool) -> Part:
    """Webdataset tars: labels are names or numbers, keys start anew in each tar or do not."""
    names, anew, key = list(images), rng.random() < 0.5, rng.choice(KEYS)
    numbers, width = rng.random() < 0.4, rng.choice([1, 4])
    labelled = [
        (str(names.index(name)).zfill(width) if numbers else name, data) for name in names for data in images[name]
    ]
    rng.shuffle(labelled)
    count = rng.choice([1, 1, 2, 3])
    parts = [labelled[first::count] for first in range(count)]
    shards, start = [], 0
    for part in parts:
        shards.append(_samples(rng, part, key, 0 if anew else start))
        start += len(part)
    refused = None
    if flaw:
        refused, entries = rng.choice(
            [
                (OTHER_SPLIT, []),
                ("bare", [("bare.png", REGULAR, picture(rng))]),
                ("alone", [("alone.cls", REGULAR, b"1")]),
                ("two", [("two.png", REGULAR, picture(rng)), ("two.jpg", REGULAR, b""), ("two.cls", REGULAR, b"1")]),
                ("empty", [("empty.png", REGULAR, picture(rng)), ("empty.cls", REGULAR, b" \n")]),
                ("dotted.v1", [("dotted.v1.png", REGULAR, picture(rng)), ("dotted.v1.cls", REGULAR, b"1")]),
                ("long.cls", [("long.png", REGULAR, picture(rng)), ("long.cls", REGULAR, b"1" * 999)]),
                ("more.tar", [("more.tar", REGULAR, b"packed")]),
                ("link.png", [("link.png", tarfile.SYMTYPE, b"target"), ("link.cls", REGULAR, b"1")]),
            ]
        )
        rng.choice(shards).extend(entries)
    part = Part("", "samples", [], images, refused, named=not numbers)
    return _placed(rng, root, [tar_of(rng, shard) for shard in shards], "tar", part)


def _samples(rng: random.Random, labelled: list[tuple[str, bytes]], key: str, start: int) -> Entries:
    entries = Entries()
    for number, (label, data) in enumerate(labelled, start):
        name = key % number
        text = rng.choice(["", "\ufeff"]) + label + rng.choice(["", "\n", "\r\n"])
        entries += [
            (f"{name}.cls", REGULAR, text.encode()),
            (f"{name}.{rng.choice(['png', 'JPG', 'jpeg'])}", REGULAR, data),
        ]
        if rng.random() < 0.2:
            entries.append((f"{name}{rng.choice(OTHERS)}", REGULAR, b"other"))
    if rng.random() < 0.2:
        entries += [("README", REGULAR, b"litter"), (".hidden.png", REGULAR, picture(rng))]
    return entries


def _placed(rng: random.Random, root: Path, data: list[bytes], ending: str, part: Part) -> Part:
    """Files in a folder, named by the folder, a range, a list or a wildcard; one file by itself."""
    root.mkdir()
    mixed = part.refused == OTHER_SPLIT
    stem = rng.choice(["train", "x", "part"])
    names = [f"{stem}-{number:05d}" for number in range(len(data))]
    part.paths = [root / f"{name}.{ending}" for name in names]
    for path, content in zip(part.paths, data, strict=True):
        path.write_bytes(content)
    beside = {"README.md": b"litter", "_SUCCESS": b"", f".{names[0]}.crc": b"", f"{OTHER_SPLIT}.{ending}": data[0]}
    urls = [f"{root}/{stem}-{choice}.{ending}" for choice in ("*", "0000[0-9]", f"{{00000..{len(data) - 1:05d}}}")]
    if len(names) > 1:
        urls.append(f"{root}/{{{','.join(names)}}}.{ending}")
    part.url = rng.choice([str(root), f"{root}/*.{ending}"] if mixed else urls)
    if not mixed and rng.random() < 0.4:
        part.url = str(root)
        del beside[f"{OTHER_SPLIT}.{ending}"]
        part.beside = list(beside)
    elif not mixed and len(data) == 1 and rng.random() < 0.5:
        part.url = str(part.paths[0])
    for name, content in beside.items():
        (root / name).write_bytes(content)
    return part


def parquet(rng: random.Random, root: Path, images: Images, flaw: bool) -> Part:
    """Parquet files as Hugging Face's library, Spark or people write them."""
    names = rng.sample(sorted(images), len(images))
    kind = rng.choice(["names", "numbers", "metadata"])
    labels = {name: name if kind == "names" else number for number, name in enumerate(names)}
    rows: Rows = [(data, labels[name]) for name in names for data in images[name]]
    rng.shuffle(rows)
    refused, spoil = OTHER_SPLIT if flaw and rng.random() < 0.2 else None, flaw and rng.random() < 0.3
    spoil = spoil and refused is None
    if flaw and not spoil and refused is None:
        bad, refused = rng.choice([((b"1", None), "None"), ((None, rows[0][1]), "no image bytes"), ((b"1", -1), "-1")])
        if bad[1] == -1 and kind == "names":
            bad, refused = (b"1", ""), "''"
        rows.insert(rng.randrange(len(rows)), bad)
    columns = (rng.choice(["image", "img", "picture"]), rng.choice(["label", "labels", "fine_label", "class"]))
    write, count = (
        _writer(rng, names if kind == "metadata" else None, columns, kind == "names"),
        rng.choice([1, 1, 2, 3]),
    )
    files = [write(rows[first::count]) for first in range(count)]
    part = Part("", "parquet", [], images, refused, columns=columns, named=kind != "numbers")
    placed = _placed(rng, root, files, "parquet", part)
    if spoil:
        path = rng.choice(placed.paths)
        path.write_bytes(rng.choice([POINTER, PAGE, b"", path.read_bytes()[:-50]]))
        placed.refused = path.name
    return placed


def _writer(
    rng: random.Random, names: list[str] | None, columns: tuple[str, str], texts: bool
) -> Callable[[Rows], bytes]:
    """Writes rows of images and labels with the same columns in each file."""
    bare, paths, more = rng.random() < 0.3, rng.choice(["none", "one", "each"]), rng.random() < 0.3
    about = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
    image_type = pa.binary() if bare else pa.struct({"bytes": pa.binary(), "path": pa.string()})

    def write(rows: Rows) -> bytes:
        path = {"none": lambda _: None, "one": lambda _: "x/1.png", "each": lambda _: f"x/{rng.randrange(10**9)}.png"}[
            paths
        ]
        images = [data if bare else {"bytes": data, "path": path(data)} for data, _ in rows]
        table = pa.table(
            {
                columns[0]: pa.array(images, image_type),
                columns[1]: pa.array([label for _, label in rows], pa.string() if texts else pa.int64()),
            }
        )
        table = table.append_column("id", pa.array(range(len(rows)))) if more else table
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)}) if names else table
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=rng.choice([1, 2, 100]))
        return buffer.getvalue()

    return write


def listed(rng: random.Random, root: Path, images: Images, flaw: bool) -> Part:
    """A tar of images alone, with a text file that has one class a line in the order of the names."""
    labelled = [(name, data) for name, found in images.items() for data in found]
    rng.shuffle(labelled)
    below = rng.choice(["", "val/"])
    entries = [(f"{below}{k:04d}.JPEG", REGULAR, data) for k, (_, data) in enumerate(labelled)]
    lines, refused = [name for name, _ in labelled], None
    encoding, end = rng.choice(["utf-8", "utf-8-sig", "utf-16"]), rng.choice(["\n", "\r\n"])
    if flaw:
        lines, refused = rng.choice([(lines[:-1], "labels.txt"), ([*lines[:-1], "unicorn"], "'unicorn'")])
    rng.shuffle(entries)
    litter = [(".DS_Store", REGULAR, b"litter")] if rng.random() < 0.3 else []
    path, labels = root.with_suffix(".tar"), root.with_name(f"{root.name} labels.txt")
    path.write_bytes(tar_of(rng, entries + litter))
    labels.write_bytes((end.join(lines) + rng.choice(["", end])).encode(encoding))
    return Part(str(path), "listed", [path], images, refused, labels)


KINDS: tuple[Callable[[random.Random, Path, Images, bool], Part], ...] = (
    *(folder, tar, zipped, class_tars, samples, parquet),
)


def random_case(seed: int, root: Path) -> dict[str, Part]:
    """An archive to train on, sometimes with held-out images; at most one of the two has a flaw."""
    rng = random.Random(seed)
    flaw = rng.random() < 0.45
    kind, images = KINDS[seed % len(KINDS)], random_images(rng)
    splits = {"train": kind(rng, root / "train", images, flaw)}
    if rng.random() < 0.4 and splits["train"].named and not flaw:
        names = rng.sample(sorted(images), rng.randint(1, len(images)))
        held_out = rng.choice([folder, tar, zipped, class_tars, listed])
        splits["held_out"] = held_out(rng, root / "held out", random_images(rng, names), rng.random() < 0.3)
    return splits
