"""Several files by one location, on stores that can be listed and on servers that cannot."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import packing
import pytest

from storage import uri
from storage.archives import patterns
from storage.archives.open import ArchiveRef, open_archive, open_splits
from storage.archives.patterns import expand
from storage.errors import InputError


def put(url: str, *names: str) -> str:
    write(url, {name: name.encode() for name in names})
    return url


def write(url: str, files: packing.Files) -> None:
    fs, path = uri.filesystem(url)
    for name, data in files.items():
        fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{path}/{name}", data)


NAMES = ["x-0.tar", "x-1.tar", "x-10.tar", "y-1.tar", ".x-2.tar", "sub/x-3.tar", "sub/y-3.tar", "x.md"]


@pytest.mark.parametrize(
    "place", ["{tmp}", "file://{tmp}", "memory://root", "memory://root/{{2024}} a+b%20", "{tmp}/[2024] *::x"]
)
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("x-*.tar", ["x-0.tar", "x-1.tar", "x-10.tar"]),
        ("x-[01].tar", ["x-0.tar", "x-1.tar"]),
        ("{y,x}-*.tar", ["y-1.tar", "x-0.tar", "x-1.tar", "x-10.tar"]),
        ("*/x-*.tar", ["sub/x-3.tar"]),
        ("s*/{x,y}-3.tar", ["sub/x-3.tar", "sub/y-3.tar"]),
        ("{x,sub/y}-{0..1}.tar", ["x-0.tar", "x-1.tar", "sub/y-0.tar", "sub/y-1.tar"]),  # braces are not looked up
        ("x-{008..011}.tar", ["x-008.tar", "x-009.tar", "x-010.tar", "x-011.tar"]),
        ("x{,-1}.tar", ["x.tar", "x-1.tar"]),
        ("**.tar", ["x-0.tar", "x-1.tar", "x-10.tar", "y-1.tar"]),
    ],
)
def test_patterns(tmp_path: Path, memory: str, place: str, pattern: str, expected: list[str]) -> None:
    url = put(place.format(tmp=tmp_path), *NAMES)
    assert expand(f"{url}/{pattern}") == [f"{url}/{name}" for name in expected]


def test_a_pattern_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), *NAMES)
    monkeypatch.chdir(tmp_path)
    assert expand("x-*.tar") == ["x-0.tar", "x-1.tar", "x-10.tar"]
    assert expand("sub/../y*") == ["sub/../y-1.tar"]


def test_what_lies_there_is_no_pattern(tmp_path: Path) -> None:
    names = ["{0..9}.tar", "{a,b}/1.tar", "[x]*.tar", "plain.tar"]
    put(str(tmp_path), *names)
    assert [expand(f"{tmp_path}/{name}") for name in names] == [None] * 4
    assert expand(f"zip://*::{tmp_path}/x.zip") is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x-{3..1}.tar", r"\{3\.\.1\} is a descending range"),
        ("x-{0..999999999}.tar", "more than 1,000 files"),
        ("{0..999}{0..999}{0..999999999}.tar", "more than 1,000 files"),
        ("z*.tar", "no such file, and none that matches"),
        ("{x,z}-*.tar", r"z-\*\.tar: no such file, and none that matches"),
        ("none/*.tar", "no such file, and none that matches"),
        ("{x-1,x-*}.tar", r"names .*/x-1\.tar twice"),
    ],
)
def test_patterns_that_name_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    monkeypatch.setattr(patterns, "MAX_FILES", 1000)
    put(str(tmp_path), *NAMES)
    with pytest.raises(InputError, match=message) as caught:
        expand(f"{tmp_path}/{pattern}")
    assert "\n" not in str(caught.value)


def test_one_split_of_a_folder(tmp_path: Path) -> None:
    """As on Hugging Face's hub: all splits lie in one folder."""
    for name, rows in {
        "train-00000-of-00002": [(b"1", "1.png", 0)],
        "train-00001-of-00002": [(b"2", "2.png", 1)],
        "test-00000-of-00001": [(b"3", "3.png", 1)],
    }.items():
        (tmp_path / f"{name}.parquet").write_bytes(packing.parquet(rows, ["cat", "dog"]))
    splits = open_splits(ArchiveRef(train=f"{tmp_path}/train-*.parquet", held_out=f"{tmp_path}/test-*.parquet"))
    assert {name: [m.name for m in split.members] for name, split in splits.items()} == {
        "train": ["cat/1.png", "dog/2.png"],
        "held_out": ["dog/3.png"],
    }


def test_folders_of_several_splits_are_not_mixed(tmp_path: Path) -> None:
    """As the hub converts data sets: a folder of Parquet files for each split."""
    for number, split in enumerate(("train", "test", "x")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0000.parquet").write_bytes(packing.parquet([(b"1", f"{number}.png", 0)]))
        (tmp_path / split / "cat.tar").write_bytes(packing.tar({f"{number}.png": b"1"}))
    for ending in ("parquet", "tar"):
        with pytest.raises(InputError, match="'test' and 'train' are splits of a data set"):
            open_archive(f"{tmp_path}/*/*.{ending}")
        for pattern in ("{train,test}/*", "t[r]ain/*"):
            assert open_archive(f"{tmp_path}/{pattern}.{ending}").members


@pytest.mark.parametrize("pattern", ["{0,2,10}", "{10,2,0}/", "{[!1],10}"])
@pytest.mark.parametrize("place", ["{tmp}", "file://{tmp}", "memory://root"])
def test_some_classes_of_a_folder(
    tmp_path: Path, memory: str, write_archive: Callable[..., Path], place: str, pattern: str
) -> None:
    """They are the archive of a folder with these classes alone."""
    url = place.format(tmp=tmp_path)
    files = packing.files_of(write_archive(tmp_path / "random", {"0": 2, "1": 1, "2": 2, "10": 1}))
    some = {name: data for name, data in files.items() if not name.startswith("1/")}
    write(f"{url}/given", files | {"0/.hidden": b"", "1/.hidden": b""})
    write(f"{url}/alone", some)
    alone, classes = open_archive(f"{url}/alone"), open_archive(f"{url}/given/{pattern}")
    assert (classes.members, classes.digest) == (alone.members, alone.digest)
    assert classes.class_names == alone.class_names == ("0", "10", "2")
    assert {member.name: classes.read(member) for member in classes.members} == some
    assert classes.account.lines() == ["passed over: 1 hidden: the name begins with a dot (first: 0/.hidden)"]


def test_held_out_images_of_some_classes(tmp_path: Path) -> None:
    put(str(tmp_path), "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/a/1.png", "val/b/2.png")
    ref = ArchiveRef(train=f"{tmp_path}/train/{{b,c}}", held_out=f"{tmp_path}/val/{{b,c}}")
    with pytest.raises(InputError, match="no such folder"):
        open_splits(ref)
    splits = open_splits(ref.model_copy(update={"held_out": f"{tmp_path}/val/[bc]"}))
    assert [(member.name, member.label) for member in splits["held_out"].members] == [("b/2.png", 0)]
    with pytest.raises(InputError, match="class 'a' is not one of the 2 classes to train on"):
        open_splits(ref.model_copy(update={"held_out": f"{tmp_path}/val/*"}))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..3}", r"/3: no such folder of images, which .*\{0\.\.3\} names"),
        ("{7..8}", r"/7: no such folder of images, which .*\{7\.\.8\} names"),
        ("{0,x.tar}", r"stands for 2 files from .*/0 to .*x\.tar; a pattern is for"),
        ("{x.tar,0}", "a pattern is for"),
        ("[0x]*", r"a pattern is for \.tar files, \.parquet files or class folders alone"),
        ("{0,empty}", r"\{0,empty\}/empty: class folder without files"),
        ("{0,deep/0}", r"\{0,deep/0\}: names two folders 0; give each class one folder"),
        ("{train,val}", "'train' and 'val' are splits of a data set"),
        ("{0,tars}", r"tars/y\.tar: an archive among class folders"),
    ],
)
def test_class_folders_that_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    names = ["0/1.png", "1/1.png", "2/1.png", "deep/0/2.png", "tars/y.tar", "train/1.png", "val/2.png", "x.tar"]
    put(str(tmp_path), *names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        open_archive(f"{tmp_path}/{pattern}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x*", r"x\*: stands for 4 files from .*x-0\.tar to .*x\.md; a pattern is for \.tar files, "),
        ("*.md", r"stands for .*/x.md; a pattern is for"),
        ("s*/", r"s\*/sub/x-3\.tar: an archive among class folders"),
    ],
)
def test_files_of_other_types_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    put(str(tmp_path), *NAMES)
    with pytest.raises(InputError, match=message):
        open_archive(f"{tmp_path}/{pattern}")


class Server(SimpleHTTPRequestHandler):
    """A web server with ranges, which lists the folders below /listed and no others."""

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """A range of a file, or a listing."""
        path = Path(self.translate_path(self.path.removeprefix("/listed")))
        if path.is_dir() and self.path.startswith("/listed"):
            links = "".join(f'<a href="{item.name}">{item.name}</a>' for item in sorted(path.iterdir()))
            self._answer(200, f"<!DOCTYPE html>{links}".encode(), "text/html")
        elif not path.is_file():
            self.send_error(404)
        else:
            data, (first, last) = path.read_bytes(), self._range()
            self._answer(206, data[first : last + 1], "application/x-tar", f"bytes {first}-{last}/{len(data)}")

    do_HEAD = do_GET  # noqa: N815  as http.server calls it

    def _range(self) -> tuple[int, int]:
        first, _, last = self.headers.get("Range", "bytes=0-999999999").removeprefix("bytes=").partition("-")
        return int(first), int(last)

    def _answer(self, code: int, body: bytes, kind: str, part: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_on_a_web_server_braces_need_no_listing_and_wildcards_do(
    tmp_path: Path, server: str, write_archive: Callable[..., Path]
) -> None:
    files = packing.files_of(write_archive(tmp_path / "plain", {"cat": 2, "dog": 3}))
    for name, data in packing.class_tars(files).items():
        (tmp_path / name).write_bytes(data)
    plain = open_archive(f"{tmp_path}/plain").digest
    assert open_archive(f"{server}/{{dog,cat}}.tar").digest == plain
    assert open_archive(f"{server}/listed/*.tar").digest == plain
    with pytest.raises(InputError, match=r"/\*\.tar: no such file, and none that matches"):
        open_archive(f"{server}/*.tar")
