import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from storage import uri
from storage.config import Config, operational
from storage.errors import InputError, StorageError
from storage.manifest import FileEntry, Manifest, StageOutput, json_digest, stage_output


class Inner(Config):
    """Part of a config."""

    rate: float = 0.5
    where: str = operational("here")


class Outer(Config):
    """A config with all kinds of fields."""

    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    named: dict[str, Inner] = {}  # noqa: RUF012
    workers: int = operational(2)
    urls: tuple[str, ...] = ()


class OtherManifest(Manifest):
    """The manifest of another stage."""

    STAGE = "other"


def name(config: Config, **changes: object) -> StageOutput:
    arguments = {"root": "/root", "stage": "plain", "version": 1, "parents": {}, "inputs": {}} | changes
    return stage_output(config=config, **arguments)  # type: ignore[arg-type]


def test_identity_leaves_operational_fields_out_at_every_depth() -> None:
    config = Outer(parts=(Inner(where="there"),), named={"a": Inner(rate=2)})
    assert config.identity() == {
        "inner": {"rate": 0.5},
        "parts": [{"rate": 0.5}],
        "named": {"a": {"rate": 2.0}},
        "urls": [],
    }


def test_digest_changes_with_what_is_made_and_not_with_how() -> None:
    first = name(Outer()).header.digest
    assert name(Outer(workers=9)).header.digest == first
    assert name(Outer(inner=Inner(where="far")), root="/elsewhere").header.digest == first
    others = [
        name(Outer(inner=Inner(rate=1))),
        name(Outer(), version=2),
        name(Outer(), stage="other"),
        name(Outer(), inputs={"archive": "0"}),
    ]
    assert len({first, *(other.header.digest for other in others)}) == 5


def test_digest_is_that_of_the_canonical_json() -> None:
    out = name(Inner(), inputs={"b": "2", "a": "1"})
    text = '{"config":{"rate":0.5},"inputs":{"a":"1","b":"2"},"stage":"plain","version":1}'
    assert out.header.digest == uri.sha256(text.encode())
    assert out.uri == f"/root/plain/{out.header.digest[:16]}"
    assert json_digest({"b": [1], "a": "x"}) == uri.sha256(b'{"a":"x","b":[1]}')


def test_configs_are_frozen_and_refuse_unknown_keys() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        Inner(rat=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        Inner().rate = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="finite"):
        Inner(rate=float("nan"))


def test_the_header_keeps_no_secrets() -> None:
    config = Outer(
        inner=Inner(where="s3://key:hunter2@bucket/x"),
        named={"a": Inner(where="https://host/weights?token=hunter2")},
        urls=("s3::simplecache::ftp://me:hunter2@host/y", "plain/path?x=1"),
    )
    header = name(config).header
    assert "hunter2" not in header.model_dump_json()
    assert header.config["inner"]["where"] == "s3://bucket/x"
    assert header.config["named"]["a"]["where"] == "https://host/weights"
    assert header.config["urls"][1] == "plain/path?x=1"


def test_commit_and_read(tmp_path: Path, committed: Callable[..., Manifest]) -> None:
    manifest = committed(tmp_path)
    assert [(entry.path, entry.size) for entry in manifest.files] == [("b/two", 2), ("one", 1)]
    assert manifest.files[1].sha256 == uri.sha256(b"1")
    for url in (manifest.uri, manifest.url):
        again = Manifest.read(url)
        assert again == manifest
        assert again.uri == manifest.uri
    assert manifest.code_version.startswith("0.")


def test_the_first_manifest_stays(tmp_path: Path, new_output: Callable[..., StageOutput]) -> None:
    out = new_output(tmp_path)
    assert out.committed(Manifest) is None
    first = out.commit(Manifest, [], counts={"images": 1})
    second = out.commit(Manifest, [], counts={"images": 2})
    assert second == first
    assert out.committed(Manifest) == first


def test_force_names_a_rerun_beside_the_old(tmp_path: Path) -> None:
    def forced() -> StageOutput:
        return name(Inner(), root=str(tmp_path), force=True)

    assert forced().header.rerun == 0
    folders = []
    for rerun in range(3):
        out = forced()
        assert out.header.rerun == rerun
        out.commit(Manifest, [])
        folders.append(out.uri)
    assert len(set(folders)) == 3
    assert name(Inner(), root=str(tmp_path)).uri == folders[0]


def test_read_errors_say_what_is_wrong(tmp_path: Path, committed: Callable[..., Manifest]) -> None:
    with pytest.raises(InputError, match="nowhere: no finished output"):
        Manifest.read(str(tmp_path / "nowhere"))
    manifest = committed(tmp_path)
    with pytest.raises(InputError, match="an output of 'plain'; one of 'other' is needed"):
        OtherManifest.read(manifest.uri)
    path = Path(manifest.url)
    path.write_text("{")
    with pytest.raises(InputError, match="not a stage manifest"):
        Manifest.read(manifest.uri)
    path.write_text(json.dumps({**json.loads(manifest.model_dump_json()), "files": 3}))
    with pytest.raises(InputError, match="not a stage manifest: files: "):
        Manifest.read(manifest.uri)


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../b", "a/..", ""])
def test_entries_cannot_leave_the_folder(path: str) -> None:
    with pytest.raises(ValidationError):
        FileEntry(path=path, size=0, sha256="0" * 64)


@pytest.mark.parametrize("remote", [False, True])
def test_check_sizes_names_the_object(
    tmp_path: Path, memory: str, committed: Callable[..., Manifest], remote: bool
) -> None:
    manifest = committed(memory if remote else tmp_path)
    manifest.check_sizes()
    uri.write(uri.join(manifest.uri, "one"), b"111")
    with pytest.raises(StorageError, match=r"/one: has 3 bytes instead of 1; run `ditflow verify .*`, then plain"):
        manifest.check_sizes()
    fs, path = uri.filesystem(uri.join(manifest.uri, "b/two"))
    fs.rm(path)
    with pytest.raises(StorageError, match="/b/two: is missing"):
        manifest.check_sizes()


def test_other_bytes_of_the_same_size_are_found(tmp_path: Path, committed: Callable[..., Manifest]) -> None:
    manifest = committed(tmp_path)
    uri.write(uri.join(manifest.uri, "b/two"), b"23")
    manifest.check_sizes()
    with pytest.raises(StorageError, match="/b/two: does not hold the bytes"):
        manifest.read_object("b/two")
    assert manifest.read_object("one") == b"1"
    with pytest.raises(StorageError, match="/three: is not in the manifest"):
        manifest.read_object("three")
