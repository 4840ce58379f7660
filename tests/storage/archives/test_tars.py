import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import packing
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from storage.archives.open import open_archive
from storage.errors import InputError

Ranges = list[tuple[int, int]]


@pytest.fixture
def ranges(memory: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranges]:
    """The ranges that are asked of the store, one a request."""
    asked: Ranges = []
    cat_file = MemoryFileSystem.cat_file

    def recorded(self: MemoryFileSystem, path: str, start: int, end: int) -> object:
        asked.append((start, end))
        return cat_file(self, path, start=start, end=end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", recorded)
    yield asked


def put(folder: Path, data: bytes, name: str = "x.tar") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def test_an_image_in_a_tar_of_tars_is_one_range(memory: str, ranges: Ranges) -> None:
    generator = np.random.default_rng(0)
    files = {f"{name}/{k}.png": generator.bytes(40_000 + k) for name in "abc" for k in range(10)}
    whole = packing.tar(packing.class_tars(files))
    fsspec.filesystem("memory").pipe_file("/root/x.tar", whole)
    archive = open_archive(f"{memory}/x.tar")
    fetched = sum(stop - start for start, stop in ranges)
    assert fetched < len(whole) / 8
    assert len(ranges) <= len(files) + 3 * 3 + 3  # a header an image, those of the class tars, and the ends
    ranges.clear()
    member = archive.members[15]
    assert archive.read(member) == files["b/5.png"]
    start = whole.index(files["b/5.png"])
    assert ranges == [(start, start + 40_005)]


def test_headers_are_read_once_until_the_tar_changes(memory: str, ranges: Ranges) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/root/x.tar", packing.tar({"a.tar": packing.tar({"1.png": b"1"})}))
    first = open_archive(f"{memory}/x.tar").digest
    assert ranges
    ranges.clear()
    assert open_archive(f"{memory}/x.tar").digest == first
    assert not ranges
    fs.pipe_file("/root/x.tar", packing.tar({"a.tar": packing.tar({"2.png": b"2"})}))
    assert open_archive(f"{memory}/x.tar").digest != first


def test_a_store_without_range_requests_is_an_error(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plain web server, which sends the whole file whatever is asked."""
    fs = fsspec.filesystem("memory")
    whole = packing.tar({"a.tar": packing.tar({"1.png": bytes(5000)})})
    fs.pipe_file("/root/x.tar", whole)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: whole)
    with pytest.raises(InputError, match=r"the store returned 20,480 bytes for a range of 2,048"):
        open_archive(f"{memory}/x.tar")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_all_forms_of_headers(tmp_path: Path, form: int) -> None:
    deep = "a/" + "folder/" * 12 + "x" * 60 + ".png"
    names = [deep, "./b/1.png", "b/.hidden.png", "README.md"]
    if form != tarfile.USTAR_FORMAT:
        names.append(f"b/{'ü' * 200}.png")
    archive = open_archive(put(tmp_path, packing.tar({name: name.encode() for name in names}, form)))
    expected = sorted(name.removeprefix("./") for name in names if name not in names[2:4])
    assert [member.name for member in archive.members] == expected
    assert [archive.read(member).decode().removeprefix("./") for member in archive.members] == expected


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_plain_files_are_read_without_tarfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: int
) -> None:
    """And all others as `tarfile` reads them, wherever they are."""
    plain, long = {f"{n % 3}/{n:04d}.png": b"x" * n for n in range(300)}, {f"0/{'y' * 120}.png": b"y", "1/ü.png": b"z"}
    files = dict(sorted({**plain, **(long if form != tarfile.USTAR_FORMAT else {})}.items()))
    where, opened = put(tmp_path, packing.tar(files, form)), list[object]()
    theirs = tarfile.open

    def noted(**kwargs: object) -> object:
        opened.append(kwargs)
        return theirs(**kwargs)

    monkeypatch.setattr(tarfile, "open", noted)
    archive = open_archive(where)
    assert {member.name: archive.read(member) for member in archive.members} == files
    assert len(opened) == len(files) - len(plain) - (form == tarfile.GNU_FORMAT)  # whose ü is one of the header


def test_a_header_for_all_further_files_is_not_forgotten(tmp_path: Path) -> None:
    """As `git archive` writes one; that of a path is not sensible, but shows whether it holds."""
    for number, headers in enumerate(({"comment": "c0ffee"}, {"path": "c/3.png"})):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
            for name in ("a/1.png", "a/2.png"):
                tar.addfile(tarfile.TarInfo(name))
    assert [member.name for member in open_archive(f"{tmp_path}/0.tar").members] == ["a/1.png", "a/2.png"]
    with pytest.raises(InputError, match=r"c/3\.png: two files have this name"):
        open_archive(f"{tmp_path}/1.tar")


def test_a_tar_cut_between_two_files_is_not_whole(tmp_path: Path) -> None:
    """`tarfile` itself would take it for a shorter tar."""
    whole = packing.tar({"a/1.png": b"1", "a/2.png": b"2"})
    with pytest.raises(InputError, match=r"damaged or not a tar, from byte 1,024 on \(no end-of-archive mark\)"):
        open_archive(put(tmp_path, whole[:1024]))


def test_a_damaged_header_is_named_with_its_byte(tmp_path: Path) -> None:
    inner = bytearray(packing.tar({"1.png": b"1", "2.png": b"2", "3.png": b"3"}))
    inner[1024 + 5] ^= 1
    with pytest.raises(InputError, match=r"x\.tar/dog\.tar: damaged or not a tar, from byte 1,536 on") as caught:
        open_archive(put(tmp_path, packing.tar({"dog.tar": bytes(inner)})))
    assert "\n" not in str(caught.value)


def test_a_giant_header_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    header = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(InputError, match="a header of 8,589,934,592 bytes"):
        open_archive(put(tmp_path, header + bytes(10_000)))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a/1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(InputError, match="'a/1.png' is a link"):
        open_archive(str(tmp_path / "x.tar"))


def test_folders_and_devices_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("a", tarfile.DIRTYPE), ("a/pipe", tarfile.FIFOTYPE), ("a/1.png", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert [member.name for member in open_archive(str(tmp_path / "x.tar")).members] == ["a/1.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no class tars, class folders or .cls files"),
        ({"1.png": b"1"}, "no class tars, class folders or .cls files"),
        ({"a.tar": packing.tar({"1.png": b"1"}), "b.tar": packing.tar({})}, r"/b\.tar: class tar without files"),
        ({"1.png": b"1", "1.cls": b"0", "2.png": b"2"}, "/2: 1 images and 0 labels"),
        ({"1.png": b"1", "1.cls": b"0", "2.cls": b"2"}, "/2: 0 images and 1 labels"),
        ({"1.png": b"1", "1.jpg": b"1", "1.cls": b"0"}, "/1: 2 images and 1 labels"),
        ({"1.png": b"1", "1.cls": b" \n"}, "one .cls file with a label"),
        ({"1.png": b"1", "1.cls": b"0" * 300}, r"1\.cls: a label of 300 bytes"),
    ],
)
def test_unusable_tars(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_archive(put(tmp_path, packing.tar(files)))
    assert "\n" not in str(caught.value)


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    one = packing.tar({"1.png": b"1"})
    twice = one[: one.index(bytes(512), 1024)] + packing.tar({"1.png": b"2"})
    with pytest.raises(InputError, match=r"x\.tar/a/1\.png: two files have this name"):
        open_archive(put(tmp_path, packing.tar({"a.tar": twice})))


def test_numbered_samples_keep_the_order_of_their_numbers(tmp_path: Path) -> None:
    files = {f"{number}.png": str(number).encode() for number in range(12)}
    files |= {f"{number}.cls": f"{number}\n".encode() for number in range(12)}
    files |= {"3.pickle": b"cos\nsystem\n", "3.pyd": b"cos\nsystem\n", "4.json": b"{}"}
    archive = open_archive(put(tmp_path, packing.tar(files)))
    assert archive.class_names == tuple(f"{number:02d}" for number in range(12))
    assert {int(archive.read(member)): member.label for member in archive.members} == {k: k for k in range(12)}
    held_out = put(tmp_path, packing.tar({"1.png": b"1", "1.cls": b"7"}), "held_out.tar")
    assert open_archive(held_out, archive.class_names).members[0].label == 7
    assert open_archive(held_out, ("1", "10", "7")).members[0].label == 2
    with pytest.raises(InputError, match="class '7' is not one of the 2 classes"):
        open_archive(held_out, ("cat", "dog"))


def test_a_label_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    files = {"1.png": b"1", "1.cls": b"\xef\xbb\xbf7\r\n"}
    assert open_archive(put(tmp_path, packing.tar(files))).class_names == ("7",)


def test_class_tars_may_have_the_marks_of_a_query_in_their_names(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("C#", "C", "what?"):
        fs.pipe_file(f"/root/{name}.tar", packing.tar({f"{name[0]}.png": name.encode()}))
    for url in (memory, f"{memory}/*.tar"):
        archive = open_archive(url)
        assert archive.class_names == ("C", "C#", "what?")
        found = {archive.class_names[member.label]: archive.read(member) for member in archive.members}
        assert found == {"C": b"C", "C#": b"C#", "what?": b"what?"}


def test_samples_may_be_numbered_anew_in_each_tar(tmp_path: Path) -> None:
    tars = {
        name: packing.tar({"0.cls": b"cat", "0.png": b"%d" % k, "1.cls": b"dog", "1.png": b"%d" % -k})
        for k, name in enumerate(["00.tar", "01.tar", "sub/00.tar"], 1)
    }
    (tmp_path / "sub").mkdir()
    for name, data in tars.items():
        put(tmp_path, data, name)
    for pattern in ("{00,01}.tar", "0*.tar"):
        archive = open_archive(f"{tmp_path}/{pattern}")
        assert {member.name: archive.read(member) for member in archive.members} == {
            "cat/00/0.png": b"1",
            "cat/01/0.png": b"2",
            "dog/00/1.png": b"-1",
            "dog/01/1.png": b"-2",
        }
    nested = open_archive(f"{tmp_path}/{{00,sub/00}}.tar")
    assert [member.name for member in nested.members] == [
        "cat/00/0.png",
        "cat/sub/00/0.png",
        "dog/00/1.png",
        "dog/sub/00/1.png",
    ]
    assert [member.name for member in open_archive(f"{tmp_path}/00.tar").members] == ["cat/0.png", "dog/1.png"]


def test_a_class_tar_may_have_the_mark_of_a_chain_in_its_name(tmp_path: Path) -> None:
    put(tmp_path, packing.tar({"1.png": b"1"}), "x::y.tar")
    for place in (str(tmp_path), f"{tmp_path}/*.tar"):
        archive = open_archive(place)
        assert archive.class_names == ("x::y",)
        assert archive.read(archive.members[0]) == b"1"
