"""Random folders, tars and zips of class folders, with what people and programs leave in them.

An archive is to be read, or has a single flaw and is to be refused by a line that names it.
"""

import io
import os
import random
import re
import shutil
import tarfile
import unicodedata
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

Images = dict[str, list[bytes]]
"""The images of each class, in an order."""
Files = dict[str, bytes]
Entries = list[tuple[str, bytes, bytes]]
"""Path, type as in a tar, and bytes of each entry."""

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
CLASSES = (
    *(
        "cat",
        "dog",
        "n01440764",
        "tench, Tinca tinca",
        "été",
        "A",
        "b",
        "7",
        "50% grey",
        "x::y",
        "日本",
        "train",
        "[x]*",
    ),
    *("#1", "it's", "a b", "-", "_private", "v1.0", "x" * 90, "what?", "cls", "{a,b}"),
)
NAMES = (
    *("%d.png", "%d copy (1).JPG", "ü%d.png", "#%d.png", "what?%d.png", "50%%25%d.png", "x::y%d.png", "[%d]*.png"),
    *("'%d\".png", "-%d.jpg", "%d.a.b.png", "%d", "%d.png ", "~%d.png", "日本%d.webp", "%d" + "x" * 150 + ".png"),
    *("_%d.png", "%d.jpeg.txt", "{%d}.gif", "IMG_%d.HEIC", "%d.tiff"),
)
REGULAR, FOLDER = tarfile.REGTYPE, tarfile.DIRTYPE


@dataclass
class Part:
    """An archive of one split."""

    url: str
    kind: str
    """Names the function of `obvious_reading` that reads it."""
    paths: list[Path]
    """Its files, in their order, or its folder."""
    images: Images
    """What was put in."""
    refused: str | None = None
    """What the line of its refusal names; None if it is to be read."""
    labels: Path | None = None
    """A list of its labels."""
    columns: tuple[str, str] = ("image", "label")
    """Of images and labels, in Parquet."""
    beside: list[str] = field(default_factory=list)
    """Names of files in the folder that are not read."""
    named: bool = True
    """Whether the archive has the names of the classes, not numbers."""


def picture(rng: random.Random, side: int = 8) -> bytes:
    """A small image of noise in any supported format."""
    height, width = rng.randint(side, side + 4), rng.randint(side, side + 4)
    pixels = np.frombuffer(rng.randbytes(3 * height * width), np.uint8).reshape(height, width, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]))
    return buffer.getvalue()


def unreadable(rng: random.Random) -> bytes:
    """A file that is no image, or none that can be used."""
    avif, whole = io.BytesIO(), picture(rng)
    Image.new("RGB", (9, 9), (rng.randrange(256), 0, 0)).save(avif, "AVIF")
    return rng.choice([b"", b"words", POINTER, PAGE, avif.getvalue(), whole[: len(whole) // 2], picture(rng, 2)])


def random_images(rng: random.Random, names: list[str] | None = None) -> Images:
    """Images by class. The first of each class can be read."""
    names = names or rng.sample(CLASSES, rng.randint(1, 4))
    images = {name: [picture(rng) for _ in range(rng.randint(1, 4))] for name in names}
    if rng.random() < 0.4:
        images[rng.choice(names)].append(unreadable(rng))
    if rng.random() < 0.2:
        images[rng.choice(names)].append(images[names[0]][0])  # one image in two classes, or twice in one
    return images


# class folders: a folder, a tar, a zip


def class_folders(rng: random.Random, images: Images) -> tuple[Files, str]:
    """Files with odd names in class folders, and what is around those: sometimes a folder."""
    around = rng.choice(["", "", "flowers/", "data/flowers/"]) if len(images) > 1 else ""
    files = {}
    for name, found in images.items():
        for number, data in enumerate(found):
            single = len(images) == 1  # two folders in a single one would be taken for classes
            below = rng.choice(["", "", "", "sub/", "sub/deeper/", "sub/" if single else "val/"]) if number else ""
            file = f"{number}.png" if single else rng.choice(NAMES) % number
            files[f"{around}{name}/{below}{file}"] = data
    return files, around


def littered(rng: random.Random, files: Files, around: str) -> Files:
    """With what lies beside images on people's disks."""
    inside = [rng.choice(sorted({path.rpartition("/")[0] for path in files})) for _ in range(5)]
    choices = [
        *(".git/config", ".DS_Store", "__MACOSX/._x.png", "LICENSE", "desktop.ini"),
        *(f"{around}README.md", "cover.png", f"{around}labels.csv"),
        *(f"{inside[0]}/.DS_Store", f"{inside[1]}/._1.png", f"{inside[2]}/Thumbs.db"),
        *(f"{inside[3]}/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", f"{inside[4]}/.cache/thumb.png"),
    ]
    chosen = [path.lstrip("/") for path in rng.sample(choices, rng.randint(0, 5))]
    return files | {path: picture(rng) if path.endswith(("png", "jpg")) else b"litter" for path in chosen}


def flawed_files(rng: random.Random, files: Files, around: str, name: str) -> tuple[Files, str]:
    """With one flaw, and what the refusal must name."""
    data, more = picture(rng), picture(rng)
    train = {f"train/{path}": data for path, data in files.items()}
    packed = rng.choice(["more.tar", f"{around}{name}/more.zip", "data.parquet", f"{around}{name}/sub/x.tar.gz"])
    decomposed = unicodedata.normalize("NFD", "né")
    beside = (files | {f"{around}cover.png": data}, f"/{around[:-1]}: holds images and folders")
    return rng.choice(
        [
            *([beside] if around else []),
            (train | {rng.choice(["val/cat/1.png", "test/1.png", "Validation/1.png"]): data}, "'train'"),
            (files | {packed: b"packed"}, packed),
            (files | {f"{around}{name}/a\nb.png": data}, r"a\nb"),
            (files | {f"{around}Bird/1.png": data, f"{around}bird/1.png": more}, "'bird'"),
            (files | {f"{around}né/1.png": data, f"{around}{decomposed}/1.png": more}, ascii(decomposed)),
        ]
    )


def folder(rng: random.Random, root: Path, images: Images, flaw: bool) -> Part:
    """A folder of class folders, some of them links."""
    files, around = class_folders(rng, images)
    inside, refused = root / f"{around}{next(iter(images))}", None
    if flaw and rng.random() < 0.5:
        files, refused = flawed_files(rng, files, around, inside.name)
    for path, data in littered(rng, files, around).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    _link(rng, root, inside.parent)
    if rng.random() < 0.2 and inside.is_dir():
        os.mkfifo(inside / "pipe.png")
    if flaw and refused is None:
        refused = rng.choice(["nothing", "broken.png", "circle.png"])
        {
            "nothing": lambda: (inside.parent / "nothing").mkdir(),
            "broken.png": lambda: (inside / "broken.png").symlink_to("/nowhere/at/all"),
            "circle.png": lambda: (inside / "circle.png").symlink_to(root),
        }[refused]()
    return Part(str(root), "folder", [root], images, refused)


def _link(rng: random.Random, root: Path, below: Path) -> None:
    """Put links in the place of some files and folders."""
    paths = [path for path in sorted(below.rglob("*")) if root / "train" not in path.parents]
    for number, path in enumerate(rng.sample(paths, min(len(paths), rng.choice([0, 0, 1, 2])))):
        if path.exists() and not path.is_symlink():
            elsewhere = root.with_name(f"{root.name} elsewhere") / str(number)
            elsewhere.parent.mkdir(exist_ok=True)
            shutil.move(path, elsewhere)
            path.symlink_to(elsewhere)


def packed_folders(rng: random.Random, images: Images, flaw: bool) -> tuple[Entries, str | None, bool]:
    """Entries of a tar or zip of class folders; what the refusal must name; whether the whole file is to be spoilt."""
    files, around = class_folders(rng, images)
    first, extra, refused, spoil = f"{around}{next(iter(images))}", Entries(), None, False
    if flaw and rng.random() < 0.4:
        files, refused = flawed_files(rng, files, around, next(iter(images)))
    elif flaw and not (spoil := rng.random() < 0.3):
        again = next(iter(files))
        refused, entry = rng.choice(
            [
                ("nothing", (f"{around}nothing", FOLDER, b"")),
                ("link.png", (f"{first}/link.png", tarfile.SYMTYPE, b"target")),
                ("back.png", (f"{first}\\back.png", REGULAR, b"")),
                ("up.png", (f"{first}/../up.png", REGULAR, b"")),
                ("absolute.png", (f"/{first}/absolute.png", REGULAR, b"")),
                (again.removeprefix(around), (again, REGULAR, b"")),
            ]
        )
        extra = [entry]
    entries = [(path, REGULAR, data) for path, data in littered(rng, files, around).items()] + extra
    rng.shuffle(entries)
    parts = [path.split("/") for path in files]
    folders = sorted({"/".join(part[:depth]) for part in parts for depth in range(1, len(part))})
    return [(name, FOLDER, b"") for name in folders if rng.random() < 0.2] + entries, refused, spoil


def spoilt(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A part of a file, two files in one, or something else in its place."""
    return rng.choice([data[: len(data.rstrip(b"\0")) // 2], data + other, POINTER, PAGE, b""])


def tar_of(rng: random.Random, entries: Entries) -> bytes:
    """A tar in one of the forms that are usual."""
    buffer, dot = io.BytesIO(), rng.choice(["", "", "./"])
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as packed:
        for path, kind, data in entries:
            info = tarfile.TarInfo(path if path.startswith("/") else dot + path)
            info.type, info.size = kind, len(data) if kind == REGULAR else 0
            info.linkname = data.decode() if kind == tarfile.SYMTYPE else ""
            packed.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar(rng: random.Random, root: Path, images: Images, flaw: bool) -> Part:
    """A tar of class folders."""
    entries, refused, spoil = packed_folders(rng, images, flaw)
    if rng.random() < 0.2:
        entries.append(("pipe", tarfile.FIFOTYPE, b""))
    data, path = tar_of(rng, entries), root.with_suffix(".tar")
    path.write_bytes(spoilt(rng, data, tar_of(rng, [("fox/1.png", REGULAR, picture(rng))])) if spoil else data)
    return Part(str(path), "tar", [path], images, path.name if spoil else refused)


def zip_of(rng: random.Random, entries: Entries) -> bytes:
    """A zip, stored or deflated."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", rng.choice([0, zipfile.ZIP_DEFLATED])) as packed:
        warnings.simplefilter("ignore")  # of names that stand twice
        for path, kind, data in entries:
            info = zipfile.ZipInfo(path + "/" if kind == FOLDER else path)
            info.external_attr = 0o120777 << 16 if kind == tarfile.SYMTYPE else 0
            packed.writestr(info, data, packed.compression)
        packed.comment = rng.choice([b"", b"made by a program"])
    return buffer.getvalue()


def _locked(rng: random.Random, data: bytes, inside: str) -> tuple[bytes, str]:
    """A zip with one image encrypted or packed by another method, as its directory says; and that image's name."""
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        names = [info.filename for info in packed.infolist() if info.filename.startswith(inside)]
    name = rng.choice([name for name in names if not re.search("/[.]|^[.]|@|__MACOSX|[.](db|ini)$|/$", name)])
    found = data.rindex(name.encode()) - 46
    place, value = rng.choice([(found + 8, 1), (found + 10, 14)])
    return data[:place] + bytes([value | data[place]]) + data[place + 1 :], name.removeprefix(inside)


def zipped(rng: random.Random, root: Path, images: Images, flaw: bool) -> Part:
    """A zip of class folders, sometimes below a folder that the URL names."""
    locked = flaw and rng.random() < 0.2
    entries, refused, spoil = packed_folders(rng, images, flaw and not locked)
    inside = rng.choice(["", "", "in a zip/"])
    if inside:
        entries = [(path if path[0] == "/" else f"{inside}{path}", kind, data) for path, kind, data in entries]
        entries.append(("fox/outside.png", REGULAR, picture(rng)))
    data, path = zip_of(rng, entries), root.with_suffix(".zip")
    if locked:
        data, refused = _locked(rng, data, inside)
    path.write_bytes(spoilt(rng, data, zip_of(rng, [("fox/1.png", REGULAR, picture(rng))])) if spoil else data)
    url = f"zip://{inside[:-1]}::{path}" if inside else str(path)
    return Part(url, "zipped", [path], images, path.name if spoil else refused)
