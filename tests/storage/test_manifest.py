import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from storage import uri
from storage.config import Config, operational
from storage.errors import InputError, StorageError
from storage.header import FileEntry, Provenance
from storage.latents import VaeInfo
from storage.manifest import Manifest, StageOutput, stage_output
from storage.seal import json_digest, sealed


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
    path.write_bytes(sealed(b'{"stage": 3}'))
    with pytest.raises(InputError, match="not a stage manifest: stage: "):
        Manifest.read(manifest.uri)
    path.write_bytes(sealed(json.dumps({**json.loads(manifest.model_dump_json()), "files": 3}).encode()))
    with pytest.raises(InputError, match="not a stage manifest: files: "):
        Manifest.read(manifest.uri)
    path.write_text(json.dumps({**json.loads(manifest.model_dump_json()), "format": 1}))
    with pytest.raises(InputError, match="has an earlier format than 2; go on with the version of .*, or delete the"):
        Manifest.read(manifest.uri)


def test_no_byte_of_a_manifest_changes_unnoticed(tmp_path: Path, committed: Callable[..., Manifest]) -> None:
    manifest = committed(tmp_path)
    path = Path(manifest.url)
    data = path.read_bytes()
    for place, bit in product(range(len(data)), range(8)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        with pytest.raises(InputError, match=r"manifest\.json: (does not hold the bytes|has an earlier format)"):
            Manifest.read(manifest.uri)
    for other in (data[:-1], data + b"\n", data.replace(b"\n", b"\r\n"), b"", b"{" * 10**6, data.upper()):
        path.write_bytes(other)
        with pytest.raises(InputError, match="does not hold the bytes that were committed"):
            Manifest.read(manifest.uri)


def test_a_manifest_ends_in_the_hash_of_all_before(tmp_path: Path, committed: Callable[..., Manifest]) -> None:
    body, last = Path(committed(tmp_path).url).read_bytes().rsplit(b",", 1)
    assert last == b'\n "sha256": "%s"\n}' % uri.sha256(body).encode()


def test_a_manifest_of_gigabytes_is_not_read(tmp_path: Path, committed: Callable[..., Manifest]) -> None:
    manifest = committed(tmp_path)
    with Path(manifest.url).open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(InputError, match="has 1,000,000,000 bytes, more than the 268,435,456 that such a file may"):
        Manifest.read(manifest.uri)


class MadeManifest(Manifest):
    """A manifest with a field of its own that holds a place."""

    STAGE = "plain"

    vae: VaeInfo | None = None


VAE = VaeInfo(source="hub/one", sha256="0" * 64, downsample=8, channels=4, scaling_factor=0.5)


def child_of(parent: Manifest) -> StageOutput:
    return name(Inner(), root=parent.root, stage="other", parents={"plain": parent})


def made(root: Path, workers: int = 1, data: bytes = b"1", **fields: Any) -> MadeManifest:
    """One output, made anew with this many workers, bytes and fields."""
    out = name(Outer(workers=workers), root=str(root), provenance=Provenance(pipeline_id=f"{workers}"))
    Path(out.url("manifest.json")).unlink(missing_ok=True)
    return out.commit(MadeManifest, [out.put("one", data)], **fields)


def test_a_repaired_parent_keeps_its_children(tmp_path: Path) -> None:
    parent = made(tmp_path, vae=VAE)
    child = child_of(parent).commit(OtherManifest, [])
    assert child.parents["plain"].content == parent.content
    again = made(tmp_path, workers=7, vae=VAE.model_copy(update={"source": "/elsewhere"}))
    assert Path(again.url).read_bytes() != b"" and again.created > parent.created and again.config != parent.config
    assert child.parent("plain", MadeManifest) == again
    assert child_of(again).committed(OtherManifest) == child


@pytest.mark.parametrize(
    "change",
    [
        {"data": b"2"},
        {"counts": {"images": 8}},
        {"metrics": {"fd": 211.8}},
        {"vae": VAE.model_copy(update={"scaling_factor": 0.51})},
    ],
)
def test_a_parent_that_was_made_otherwise_is_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"counts": {"images": 7}, "metrics": {"fd": 111.8}, "vae": VAE}
    child = child_of(made(tmp_path, **fields)).commit(OtherManifest, [])
    again = made(tmp_path, **fields | change)
    reason = r"was made from other bytes than its plain has now, .*; delete manifest\.json there and run other again"
    with pytest.raises(InputError, match=reason):
        child.parent("plain", MadeManifest)
    with pytest.raises(InputError, match=reason):
        child_of(again).committed(OtherManifest)


def test_a_grandparent_that_was_made_otherwise_is_noticed(tmp_path: Path) -> None:
    first = made(tmp_path, data=b"1")
    child = child_of(first).commit(OtherManifest, [])
    Path(child.url).unlink()
    again = child_of(made(tmp_path, data=b"2")).commit(OtherManifest, [])
    assert again.digest == child.digest
    assert again.content != child.content


def test_a_manifest_in_the_folder_of_another_output_is_refused(tmp_path: Path) -> None:
    first, other = name(Inner(), root=str(tmp_path)), name(Inner(rate=2), root=str(tmp_path))
    uri.write(other.url("manifest.json"), uri.read(first.commit(Manifest, []).url))
    with pytest.raises(InputError, match="holds the manifest of another output; delete manifest.json there"):
        other.committed(Manifest)


def test_content_is_that_of_the_file_whatever_fields_came_later(tmp_path: Path) -> None:
    class Later(MadeManifest):
        added: int = 7

    written = made(tmp_path)
    assert Later.read(written.uri).content == Manifest.read(written.uri).content == written.content


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
