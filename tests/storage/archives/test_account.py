"""Every entry of an archive is an image of a class, is passed over for a stated reason, or is refused."""

import os
import tarfile
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import packing
import pytest

from storage.archives.open import Archive, open_archive
from storage.errors import InputError

FILES = {"a/1.png": b"1", "a/2.png": b"22", "b/1.png": b"333"}
Put = Callable[[Path, packing.Files], str]


def folder(root: Path, files: packing.Files) -> str:
    for name, data in files.items():
        (root / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "x" / name).write_bytes(data)
    return str(root / "x")


def put(root: Path, data: bytes, name: str = "x.tar") -> str:
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(data)
    return str(root / name)


def tar(root: Path, files: packing.Files) -> str:
    return put(root, packing.tar(files))


def zipped(root: Path, files: packing.Files) -> str:
    return put(root, packing.zipped(files), "x.zip")


FORMS: dict[str, Put] = {"folder": folder, "tar": tar, "zip": zipped}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Put:
    """Writes class folders in each form that they may have."""
    return FORMS[request.param]


def names(archive: Archive) -> list[str]:
    return [member.name for member in archive.members]


def passed(archive: Archive) -> dict[str, tuple[int, str]]:
    """Count and first example by the first word of the reason."""
    return {item.reason.split()[0].strip(":,"): (item.count, item.first) for item in archive.account.passed_over}


def refused(url: str) -> str:
    with pytest.raises(InputError) as caught:
        open_archive(url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_image_is_counted_by_reason(tmp_path: Path, form: Put) -> None:
    more = {
        "README.md": b"",
        "cover.png": b"",
        ".git/config": b"",
        ".git/HEAD": b"",
        "a/.DS_Store": b"",
        "__MACOSX/a/._1.png": b"",
        "a/Thumbs.db": b"",
        "b/desktop.ini": b"",
        "a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg": b"",
        "a/@eaDir/2.png/SYNOPHOTO_THUMB_M.jpg": b"",
    }
    archive = open_archive(form(tmp_path, FILES | more))
    assert names(archive) == sorted(FILES)
    assert {reason: count for reason, (count, _) in passed(archive).items()} == {
        "hidden": 2,
        "made": 4,
        "image": 1,
        "file": 1,
    }
    assert passed(archive)["image"] == (1, "cover.png")
    assert open_archive(form(tmp_path / "plain", FILES)).digest == archive.digest


def test_names_of_any_bytes_are_shown_in_one_line(tmp_path: Path, form: Put) -> None:
    line = "".join(open_archive(form(tmp_path, FILES | {"a/.\n\x1b[2J": b""})).account.lines())
    assert r"(first: a/.\n\x1b[2J)" in line
    assert r"a/\n.zip: an archive" in refused(form(tmp_path, FILES | {"a/\n.zip": b""}))


def test_a_hidden_name_that_is_not_utf8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", errors="surrogateescape") as packed:
        for name in ("a/1.png", "a/.\udcff"):
            packed.addfile(tarfile.TarInfo(name))
    account = open_archive(f"{tmp_path}/x.tar").account
    assert r"a/.\udcff" in account.model_dump_json().replace("\\\\", "\\")


def test_a_folder_around_the_classes(tmp_path: Path, form: Put) -> None:
    inside = {f"flowers/{name}": data for name, data in FILES.items()}
    archive = open_archive(form(tmp_path, inside | {"flowers/LICENSE.txt": b"", "flowers/.hidden": b""}))
    assert archive.class_names == ("a", "b")
    assert names(archive) == sorted(FILES)
    assert [archive.read(member) for member in archive.members] == [FILES[name] for name in sorted(FILES)]
    assert "'flowers'" in archive.account.notes[0]


def test_folders_around_a_folder_around_the_classes(tmp_path: Path, form: Put) -> None:
    archive = open_archive(form(tmp_path, {f"data/flowers/{name}": data for name, data in FILES.items()}))
    assert names(archive) == sorted(FILES)


def test_one_class_with_folders_inside_is_one_class(tmp_path: Path, form: Put) -> None:
    files = {"faces/1.png": b"1", "faces/more/2.png": b"2"}
    assert names(open_archive(form(tmp_path, files))) == sorted(files)
    files["faces/others/3.png"] = b"3"
    assert "/faces: holds images and folders" in refused(form(tmp_path, files))


def test_folders_named_after_other_classes(tmp_path: Path, form: Put) -> None:
    """As when a folder was unpacked into its neighbour."""
    assert "/a/b: in a class, but named after the class 'b'" in refused(form(tmp_path, FILES | {"a/b/1.png": b"1"}))
    assert len(open_archive(form(tmp_path / "own", FILES | {"a/a/1.png": b"1"})).members) == 4
    assert len(open_archive(form(tmp_path / "numbers", {"0/1/2.png": b"1", "1/2.png": b"2"})).members) == 2


def test_numbered_parts_of_one_class_are_one_class(tmp_path: Path, form: Put) -> None:
    """As FFHQ is published."""
    files = {f"faces/{k // 2:02d}000/{k:05d}.png": bytes([k]) for k in range(6)}
    archive = open_archive(form(tmp_path, files))
    assert archive.class_names == ("faces",)
    assert names(archive) == sorted(files)
    assert "parts" in archive.account.notes[0]


@pytest.mark.parametrize("name", ["{first:05d}/{k:05d}.png", "{part:05d}/img{k:08d}.png"])
def test_numbered_parts_are_not_classes(tmp_path: Path, form: Put, name: str) -> None:
    """FFHQ as published, and as EDM's tools unpack it."""
    numbers = [(k, k // 1000) for k in (0, 999, 1000, 2001)]
    files = {name.format(k=k, first=1000 * part, part=part): b"1" for k, part in numbers}
    assert "/00000: one of the numbered parts of a set" in refused(form(tmp_path, files | {"LICENSE.txt": b""}))
    around = {f"faces/{path}": data for path, data in files.items()}
    archive = open_archive(form(tmp_path / "around", around | {"faces/LICENSE.txt": b""}))
    assert archive.class_names == ("faces",)
    assert archive.account.notes[0].endswith("are taken as parts of it")
    classes = {path.replace(".png", "a.png"): data for path, data in files.items()}
    assert len(open_archive(form(tmp_path / "classes", classes)).class_names) == 3


def test_numbered_classes_in_a_folder(tmp_path: Path, form: Put) -> None:
    files = {f"faces/{k // 2:07d}/{k % 2:03d}.png": bytes([k]) for k in range(6)}
    assert open_archive(form(tmp_path, files)).class_names == ("0000000", "0000001", "0000002")


def test_held_out_images_in_a_folder_of_their_own(tmp_path: Path, form: Put) -> None:
    archive = open_archive(form(tmp_path, {"val/b/1.png": b"1"}), ("a", "b"))
    assert names(archive) == ["b/1.png"]


@pytest.mark.parametrize("around", ["", "flowers/"])
def test_splits_are_not_classes(tmp_path: Path, form: Put, around: str) -> None:
    files = {f"{around}{split}/{name}": data for split in ("train", "val") for name, data in FILES.items()}
    text = refused(form(tmp_path, files))
    assert "'train' and 'val' are splits" in text


def test_a_class_of_trains_is_a_class(tmp_path: Path, form: Put) -> None:
    assert open_archive(form(tmp_path, {"train/1.png": b"1", "boat/1.png": b"1"})).class_names == ("boat", "train")


def test_splits_inside_a_class(tmp_path: Path, form: Put) -> None:
    files = {f"{name}/{split}/1.png": b"1" for split in ("train", "test") for name in "ab"}
    assert "'test' and 'train' are splits" in refused(form(tmp_path, files))


@pytest.mark.parametrize("name", ["c.tar", "c.zip", "c.tar.gz", "a/c.tar", "c.parquet"])
def test_archives_among_class_folders(tmp_path: Path, form: Put, name: str) -> None:
    assert f"/{name}: " in refused(form(tmp_path, FILES | {name: b""}))


def test_images_below_a_class_are_counted(tmp_path: Path, form: Put) -> None:
    archive = open_archive(form(tmp_path, FILES | {"a/more/3.png": b"3"}))
    assert names(archive) == sorted([*FILES, "a/more/3.png"])
    assert "1 (first: a/more/3.png)" in archive.account.notes[0]


def test_names_that_are_not_those_of_images_are_counted(tmp_path: Path, form: Put) -> None:
    files = FILES | {"b/list.txt": b"", "b/2": b""}
    note = "files taken for images, without the ending of an image: 2 (first: b/2)"
    assert open_archive(form(tmp_path, files)).account.notes == (note,)
    assert open_archive(folder(tmp_path / "tars", packing.class_tars(files))).account.notes == (note,)


def test_a_folder_of_labels_is_not_a_class(tmp_path: Path, form: Put) -> None:
    files = FILES | {"labels/2.txt": b"2", "labels/sub/1.xml": b"<x/>"}
    said = "class 'labels' has no images, only files such as 'labels/2.txt'"
    assert said in refused(form(tmp_path, files))
    assert said in refused(folder(tmp_path / "tars", packing.class_tars(files)))
    named_so = form(tmp_path / "named", FILES | {"labels/2.txt": b"\x89PNG\r\n\x1a\n"})
    assert "labels" in open_archive(named_so).class_names


def test_labels_in_a_file_are_not_folders(tmp_path: Path, form: Put) -> None:
    """As the tools of StyleGAN and EDM pack images."""
    files = {f"0000{k // 2}/img0000000{k}.png": b"1" for k in range(4)}
    assert "dataset.json" in refused(form(tmp_path, files | {"dataset.json": b"{}"}))


@pytest.mark.parametrize(
    ("first", "second"),
    [("Dog", "dog"), (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"))],
)
def test_classes_that_look_alike(tmp_path: Path, form: Put, first: str, second: str) -> None:
    assert "are the same" in refused(form(tmp_path, {f"{first}/1.png": b"1", f"{second}/2.png": b"2"}))


def test_letters_are_classes(tmp_path: Path, form: Put) -> None:
    assert open_archive(form(tmp_path, {"a/1.png": b"1", "A/1.png": b"2"})).class_names == ("A", "a")


def test_empty_class_folders(tmp_path: Path) -> None:
    Path(folder(tmp_path, FILES), "c").mkdir()
    with tarfile.open(tar(tmp_path, FILES), "a") as packed:
        info = tarfile.TarInfo("c")
        info.type = tarfile.DIRTYPE
        packed.addfile(info)
    with zipfile.ZipFile(zipped(tmp_path, FILES), "a") as opened:
        opened.writestr("c/", b"")
    (tmp_path / "all" / "c").mkdir(parents=True)
    for name in ("x", "x.tar", "x.zip", "all"):
        assert "/c: class folder without files; fill it or remove it" in refused(f"{tmp_path}/{name}")


def test_a_link_to_a_folder_inside_a_class_is_followed(tmp_path: Path) -> None:
    url = folder(tmp_path, FILES)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/3.png").write_bytes(b"3")
    Path(url, "a/more").symlink_to(tmp_path / "elsewhere")
    archive = open_archive(url)
    assert names(archive) == sorted([*FILES, "a/more/deep/3.png"])
    assert archive.read(archive.members[2]) == b"3"


@pytest.mark.parametrize("target", [".", "a", "..", "a/down"])
def test_circles_of_links_are_refused(tmp_path: Path, target: str) -> None:
    url = folder(tmp_path, FILES | {"a/down/3.png": b"3"})
    Path(url, "a/down/loop").symlink_to(Path(url, target))
    assert "a/down/loop" in refused(url)
    assert "circle" in refused(url)


def test_two_tars_joined_by_cat(tmp_path: Path) -> None:
    first, second = packing.tar(FILES), packing.tar({"c/1.png": b"4"})
    text = refused(put(tmp_path, first + second))
    assert f"after its end at byte {first.rindex(b'333') + 512:,}" in text
    assert "c/1.png" not in text
    assert names(open_archive(put(tmp_path, first + bytes(1 << 20)))) == sorted(FILES)
    inner = packing.tar({"1.png": b"1"}) * 2
    assert "x.tar/a.tar: " in refused(tar(tmp_path, {"a.tar": inner}))


def test_two_zips_joined_by_cat(tmp_path: Path) -> None:
    first, second = packing.zipped(FILES), packing.zipped({"c/1.png": b"4"})
    assert "x.zip: another zip lies in front" in refused(put(tmp_path, first + second, "x.zip"))


def test_samples_with_dots_in_their_names(tmp_path: Path) -> None:
    files = {"1.png": b"1", "1.cls": b"0", "2.v1.png": b"2", "2.v1.cls": b"1"}
    text = refused(tar(tmp_path, files))
    assert "/2.v1." in text
    assert "first dot" in text
    assert "2.v1.png" in refused(tar(tmp_path, {"2.v1.png": b"2", "1.png": b"1", "1.cls": b"1"}))


def test_other_fields_of_samples_are_counted(tmp_path: Path) -> None:
    files = {"1.png": b"1", "1.cls": b"0", "1.json": b"{}", "1.mask.png": b"", "README": b"", "2.txt": b""}
    archive = open_archive(tar(tmp_path, files))
    assert names(archive) == ["0/1.png"]
    assert passed(archive) == {"field": (2, "1.json"), "neither": (2, "2.txt")}


def test_class_tars_with_other_files(tmp_path: Path) -> None:
    tars = packing.class_tars(FILES)
    archive = open_archive(tar(tmp_path, tars | {"README.md": b"", ".x": b"", "cover.png": b""}))
    assert names(archive) == sorted(FILES)
    assert {reason: count for reason, (count, _) in passed(archive).items()} == {"hidden": 1, "file": 1, "image": 1}
    assert "'c/1.png'" in refused(tar(tmp_path, tars | {"c/1.png": b"1"}))
    assert "/a.tar: an archive among samples" in refused(tar(tmp_path, tars | {"1.png": b"1", "1.cls": b"1"}))
    assert "/more/c.tar: " in refused(tar(tmp_path, tars | {"more/c.tar": packing.tar({"1.png": b"1"})}))
    assert "/a.tar/c.tar: " in refused(tar(tmp_path, {"a.tar": packing.tar({"c.tar": b""})}))
    assert "'train'" in refused(tar(tmp_path, {"train/a.tar": tars["a.tar"], "train/1.png": b"", "train/2.png": b""}))
    around = {f"train/{name}": data for name, data in tars.items()}
    assert names(open_archive(tar(tmp_path, around))) == sorted(FILES)


def test_a_tar_of_class_folders_is_not_a_class(tmp_path: Path) -> None:
    for around in ("", "flowers/"):
        inside = packing.tar({f"{around}{name}": data for name, data in FILES.items()})
        assert "/flowers.tar: holds folders, which may be classes" in refused(folder(tmp_path, {"flowers.tar": inside}))
    parts = packing.tar({f"{k}0000/{k}.png": b"1" for k in range(3)})
    assert open_archive(folder(tmp_path / "parts", {"faces.tar": parts})).class_names == ("faces",)
    own = packing.tar({"a/1.png": b"1", "b.png": b"2"})
    assert len(open_archive(folder(tmp_path / "own", {"a.tar": own})).members) == 2


def test_samples_without_labels_are_not_classes(tmp_path: Path) -> None:
    """As image-text pairs are packed: each tar would become a class."""
    files = {"00000.tar": packing.tar({"1.jpg": b"1", "1.txt": b"a cat"})}
    assert "no .cls" in refused(folder(tmp_path, files))


def test_folders_of_mixed_archives(tmp_path: Path) -> None:
    tars, rows = packing.class_tars(FILES), packing.parquet_of(FILES)
    assert "x/a.tar: " in refused(folder(tmp_path / "1", tars | {"y.parquet": rows}))
    assert "x/y.zip: " in refused(folder(tmp_path / "2", tars | {"y.zip": b""}))
    assert "x/y.zip: " in refused(folder(tmp_path / "3", {"y.zip": b""}))
    archive = open_archive(folder(tmp_path / "4", {"y.parquet": rows, "README.md": b"", "Thumbs.db": b""}))
    assert {reason: count for reason, (count, _) in passed(archive).items()} == {"file": 1, "made": 1}
    assert "x/data/y.parquet: " in refused(folder(tmp_path / "5", {"data/y.parquet": rows}))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train-00000-of-00001", "validation-00000-of-00001"),
        ("train-00000-of-00001", "unsupervised-00000-of-00001"),
        ("train", "test"),
        ("set-train-0000", "set-val-0000"),
        ("part-0000", "val-0000"),
        ("a", "test-00000-of-00001"),
    ],
)
def test_splits_in_one_folder(tmp_path: Path, first: str, second: str) -> None:
    rows = {f"{name}.parquet": packing.parquet_of(FILES) for name in (first, second)}
    text = refused(folder(tmp_path, rows))
    assert f"{first}.parquet" in text
    assert f"{second}.parquet" in text
    samples = packing.sample_tars({"a/1.png": b"1", "b/2.png": b"2"}, {"a": "0", "b": "1"})
    tars = {f"{name}.tar": data for name, data in zip((first, second), samples.values(), strict=True)}
    assert f"{first}.tar" in refused(folder(tmp_path / "tars", tars))


def test_splits_that_are_named_in_braces_are_meant(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        put(tmp_path, packing.parquet([(b"1", f"{number}.png", 0)]), f"{name}-0.parquet")
    assert len(open_archive(f"{tmp_path}/{{train,val}}-*.parquet").members) == 2
    assert f"name one split, such as {tmp_path}/test*.parquet" in refused(f"{tmp_path}/*.parquet")


def test_a_class_of_trains_among_class_tars(tmp_path: Path) -> None:
    tars = {"freight-train.tar": packing.tar({"1.png": b"1"}), "test-tube.tar": packing.tar({"2.png": b"1"})}
    assert open_archive(folder(tmp_path, tars)).class_names == ("freight-train", "test-tube")
    splits = {"train.tar": packing.tar(FILES), "test.tar": packing.tar(FILES)}
    assert "are splits" in refused(folder(tmp_path / "2", splits))


def test_rows_without_images_are_found_when_listed(tmp_path: Path) -> None:
    rows = packing.parquet([(b"1", "1.png", 0), (None, "2.png", 0)])
    assert "row group 0: 1 of 2 rows" in refused(put(tmp_path, rows, "x.parquet"))


def test_class_names_in_some_files_only(tmp_path: Path) -> None:
    files = {"1.parquet": packing.parquet([(b"1", "1", 0)], ["cat"]), "2.parquet": packing.parquet([(b"2", "2", 0)])}
    assert "2.parquet: " in refused(folder(tmp_path, files))


def test_links_in_zips_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("a/3.png")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(zipped(tmp_path, FILES), "a") as packed:
        packed.writestr(info, "1.png")
    assert "a/3.png: a link" in refused(f"{tmp_path}/x.zip")


def test_special_files_are_passed_over(tmp_path: Path) -> None:
    url = folder(tmp_path, FILES)
    os.mkfifo(Path(url, "a/pipe.png"))
    assert passed(open_archive(url)) == {"neither": (1, "a/pipe.png")}
    with tarfile.open(tar(tmp_path, FILES), "a") as packed:
        info = tarfile.TarInfo("a/pipe.png")
        info.type = tarfile.FIFOTYPE
        packed.addfile(info)
    assert passed(open_archive(f"{tmp_path}/x.tar")) == {"neither": (1, "a/pipe.png")}


def test_one_name_twice(tmp_path: Path) -> None:
    for again in ("a/1.png", "./a/1.png", "a//1.png"):
        with tarfile.open(tar(tmp_path, FILES), "a") as packed:
            packed.addfile(tarfile.TarInfo(again))
        with warnings.catch_warnings(), zipfile.ZipFile(zipped(tmp_path, FILES), "a") as opened:
            warnings.simplefilter("ignore")
            opened.writestr(again, b"")
        for name in ("x.tar", "x.zip"):
            assert f"{name}/a/1.png: two files have this name" in refused(f"{tmp_path}/{name}")


def test_an_image_beside_class_tars_in_a_folder_may_be_one_of_a_class(tmp_path: Path) -> None:
    tars = packing.class_tars(FILES) | {"cover.png": b""}
    assert passed(open_archive(tar(tmp_path, tars))) == {"image": (1, "cover.png")}
    text = refused(tar(tmp_path, {f"train/{name}": data for name, data in tars.items()}))
    assert "train/a.tar: a tar beside 'train/cover.png', so 'train' may be a class" in text
