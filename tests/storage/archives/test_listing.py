"""All forms of archives: the same images, however they are packed, are the same images."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import packing
import pytest

from storage import uri
from storage.archives.known import input_digests
from storage.archives.open import Archive, ArchiveRef, open_archive, open_splits
from storage.errors import InputError, StorageError
from storage.manifest import stage_output
from storage.shards import shard
from storage.shards.runners import Local
from storage.shards.shard import ShardConfig, ShardManifest
from storage.tracker import NullTracker

Form = Callable[[str, packing.Files], str]


def put(url: str, data: bytes) -> str:
    fs, path = uri.filesystem(url)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, data)
    return url


def put_all(url: str, files: packing.Files) -> str:
    for name, data in files.items():
        put(f"{url}/{name}", data)
    return url


def samples(files: packing.Files) -> dict[str, bytes]:
    return packing.sample_tars(files, {name: name for name in packing.by_class(files)})


FORMS: dict[str, Form] = {
    "folder": put_all,
    "tar of class tars": lambda url, files: put(f"{url}.tar", packing.tar(packing.class_tars(files))),
    "folder of class tars": lambda url, files: put_all(url, packing.class_tars(files)),
    "tar of class folders": lambda url, files: put(f"{url}.tar", packing.tar(files)),
    "stored zip": lambda url, files: put(f"{url}.zip", packing.zipped(files)),
    "deflated zip": lambda url, files: put(f"{url}.zip", packing.zipped(files, zipfile.ZIP_DEFLATED)),
    "folder of samples": lambda url, files: put_all(url, samples(files)),
    "numbered samples": lambda url, files: put_all(url, samples(files)) + "/part-{000..001}.tar",
}
PARQUET: dict[str, Form] = {
    "parquet": lambda url, files: put(f"{url}.parquet", packing.parquet_of(files)),
    "folder of parquet": lambda url, files: put_all(url, {"a.parquet": packing.parquet_of(files)}),
}


@pytest.fixture
def files(tmp_path: Path, write_archive: Callable[..., Path]) -> dict[str, bytes]:
    return packing.files_of(write_archive(tmp_path / "plain", {"cat": 5, "dog": 6}))


def run(root: Path, archive: ArchiveRef) -> ShardManifest:
    config = ShardConfig(images_per_shard=4, runner=Local(count=2))
    inputs = input_digests(archive)
    out = stage_output(str(root), shard.STAGE, shard.VERSION, config, parents={}, inputs=inputs)
    return shard.run(config, archive, out=out, tracker=NullTracker())


def content(archive: Archive) -> dict[str, tuple[int, bytes]]:
    return {member.name: (member.label, archive.read(member)) for member in archive.members}


@pytest.mark.parametrize("form", FORMS | PARQUET)
def test_every_archive_type_gives_the_same_tars(tmp_path: Path, files: dict[str, bytes], form: str) -> None:
    plain = ArchiveRef(train=str(tmp_path / "plain"))
    packed = ArchiveRef(train=(FORMS | PARQUET)[form](f"{tmp_path}/packed", files))
    assert run(tmp_path / "out", packed).files == run(tmp_path / "plain out", plain).files


@pytest.mark.parametrize("form", FORMS)
def test_the_digest_of_the_same_names_is_the_same(
    tmp_path: Path, memory: str, files: dict[str, bytes], form: str
) -> None:
    plain, packed = open_archive(str(tmp_path / "plain")), open_archive(FORMS[form](f"{memory}/packed", files))
    assert packed.class_names == plain.class_names == ("cat", "dog")
    assert packed.members == plain.members
    assert packed.digest == plain.digest
    assert content(packed) == content(plain)


@pytest.mark.parametrize("form", FORMS | PARQUET)
def test_places_of_odd_names(tmp_path: Path, files: dict[str, bytes], form: str) -> None:
    url = (FORMS | PARQUET)[form](f"{tmp_path}/a::b c#?%20/[x] ü", files)
    archive = open_splits(ArchiveRef(train=url))["train"]
    assert content(archive) == content(open_archive(str(tmp_path / "plain")))


@pytest.mark.parametrize("form", PARQUET)
def test_parquet_on_a_remote_store(tmp_path: Path, memory: str, files: dict[str, bytes], form: str) -> None:
    plain, packed = open_archive(str(tmp_path / "plain")), open_archive(PARQUET[form](f"{memory}/packed", files))
    assert content(packed) == content(plain)
    assert packed.digest != plain.digest


@pytest.mark.parametrize("form", FORMS | PARQUET)
def test_held_out_follows_the_trained_classes(tmp_path: Path, files: dict[str, bytes], form: str) -> None:
    url = (FORMS | PARQUET)[form](f"{tmp_path}/packed", files)
    archive = open_archive(url, ("ant", "cat", "dog"))
    assert {member.name[:3]: member.label for member in archive.members} == {"cat": 1, "dog": 2}
    with pytest.raises(InputError, match="class 'dog' is not one of the 2 classes to train on"):
        open_archive(url, ("ant", "cat"))


@pytest.mark.parametrize("form", [name for name in FORMS | PARQUET if "folder" not in name and "samples" not in name])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_a_truncated_file_is_one_line(tmp_path: Path, files: dict[str, bytes], form: str, share: float) -> None:
    path = Path((FORMS | PARQUET)[form](f"{tmp_path}/packed", files))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=f"{path}.*: damaged or not a ") as caught:
        open_archive(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [name for name in FORMS if "folder" not in name and "samples" not in name])
def test_a_file_that_vanishes_is_named(tmp_path: Path, files: dict[str, bytes], form: str) -> None:
    path = Path(FORMS[form](f"{tmp_path}/packed", files))
    archive = open_archive(str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:600])
    with pytest.raises(StorageError, match=r"dog/005\.JPEG: "):
        archive.read(archive.members[-1])
    path.unlink()
    with pytest.raises(StorageError, match=r"dog/005\.JPEG: "):
        archive.read(archive.members[-1])


@pytest.mark.parametrize("ending", ["", ".tar", ".zip", ".parquet", "-{0..3}.tar"])
def test_a_missing_archive_is_an_error(tmp_path: Path, ending: str) -> None:
    with pytest.raises(InputError, match="none.*: no such f"):
        open_archive(f"{tmp_path}/none{ending}")


def test_files_that_are_not_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.tar\.gz: a compressed tar"):
        open_archive(put(f"{tmp_path}/x.tar.gz", b""))
    with pytest.raises(InputError, match="neither a folder nor a .tar, .zip or .parquet file"):
        open_archive(put(f"{tmp_path}/x.rar", b""))
    with pytest.raises(ValueError, match="held_out_labels needs held_out"):
        ArchiveRef(train="/a", held_out_labels="/b")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize("name", ["x.tar", "x.zip", "x.parquet", "x/a.tar", "x/a.parquet", "x-{0..0}.tar"])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (POINTER, "a Git LFS pointer, not the file itself"),
        (b"<!DOCTYPE html><p>404", "an HTML page, not the file itself"),
    ],
)
def test_what_was_saved_in_the_place_of_an_archive_is_named(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    put(f"{tmp_path}/{name.replace('{0..0}', '0')}", data)
    url = str(tmp_path / (name if "." in name.partition("/")[0] else "x"))
    with pytest.raises(InputError, match=what) as caught:
        open_archive(url)
    assert "\n" not in str(caught.value)


def test_a_class_tar_that_was_not_fetched_is_named(tmp_path: Path) -> None:
    url = put(f"{tmp_path}/x.tar", packing.tar({"a.tar": packing.tar({"1.png": b"1"}), "b.tar": POINTER}))
    with pytest.raises(InputError, match=r"x\.tar/b\.tar: a Git LFS pointer"):
        open_archive(url)


@pytest.mark.parametrize("name", ["/etc/x.png", "a/../../x.png"])
@pytest.mark.parametrize("pack", [packing.tar, packing.zipped])
def test_unsafe_file_names_are_refused(tmp_path: Path, pack: Callable[[packing.Files], bytes], name: str) -> None:
    url = put(f"{tmp_path}/x.{'tar' if pack is packing.tar else 'zip'}", pack({"a/1.png": b"1", name: b"2"}))
    with pytest.raises(InputError, match="is absolute or leads upwards") as caught:
        open_archive(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\\2.png", "a\\..\\x.png"])
@pytest.mark.parametrize("pack", [packing.tar, packing.zipped])
def test_backslashes_are_named(tmp_path: Path, pack: Callable[[packing.Files], bytes], name: str) -> None:
    url = put(f"{tmp_path}/x.{'tar' if pack is packing.tar else 'zip'}", pack({"a/1.png": b"1", name: b"2"}))
    with pytest.raises(InputError, match=r"x\.(tar|zip): the file name 'a\\.* has a backslash; pack it again with /"):
        open_archive(url)


def test_class_names_in_two_unicode_forms_are_named(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    same = r"class names '.*' and '.*' are the same text in two Unicode forms; rename one"
    both = put(f"{tmp_path}/x.zip", packing.zipped({f"{composed}/1.png": b"1", f"{decomposed}/1.png": b"2"}))
    for known in (None, (composed,), ("a", composed, "z")):
        with pytest.raises(InputError, match=same) as caught:
            open_archive(both, known)
        assert r"'caf\xe9'" in str(caught.value)
        assert r"'cafe\u0301'" in str(caught.value)
    one = put(f"{tmp_path}/y.zip", packing.zipped({f"{decomposed}/1.png": b"1", f"{decomposed}/{composed}.png": b"2"}))
    assert open_archive(one).class_names == (decomposed,)
    with pytest.raises(InputError, match=same):
        open_archive(one, (composed,))


def test_a_file_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(f"{tmp_path}/x.tar", packing.tar({"a/1.png": b"1234"}))
    monkeypatch.setattr("storage.archives.listing.MAX_BYTES", 4)
    open_archive(url)
    monkeypatch.setattr("storage.archives.listing.MAX_BYTES", 3)
    with pytest.raises(InputError, match=r"a/1\.png: 4 bytes, more than the 3 allowed"):
        open_archive(url)


def test_names_that_would_break_a_line_are_refused(tmp_path: Path) -> None:
    url = put(f"{tmp_path}/x.tar", packing.tar({"a/1\n2.png": b"1"}))
    with pytest.raises(InputError, match=r"1\\n2\.png.*rename the file") as caught:
        open_archive(url)
    assert "\n" not in str(caught.value)
