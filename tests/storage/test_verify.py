from collections.abc import Callable
from pathlib import Path

import pytest

from storage import records, uri, verify
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef
from storage.errors import InputError, StorageError
from storage.header import FileEntry
from storage.manifest import Manifest, stage_output
from storage.seal import sealed
from storage.shards import shard
from storage.shards.runners import Local
from storage.shards.shard import ShardConfig, ShardManifest
from storage.tracker import NullTracker

CONFIG = ShardConfig(images_per_shard=7, runner=Local(count=2))
TAR, RECORD = "train/00001.tar", "records/train-00001.json"


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return str(tmp_path / "root") if request.param == "local" else memory


@pytest.fixture
def archive(tmp_path: Path, write_archive: Callable[..., Path]) -> ArchiveRef:
    return ArchiveRef(train=str(write_archive(tmp_path / "train", {"cat": 11, "dog": 12})))


def sharded(root: str, archive: ArchiveRef) -> ShardManifest:
    inputs = input_digests(archive)
    out = stage_output(root, shard.STAGE, shard.VERSION, CONFIG, parents={}, inputs=inputs)
    return shard.run(CONFIG, archive, out=out, tracker=NullTracker())


def objects(manifest: Manifest) -> dict[str, bytes]:
    return {entry.path: uri.read(uri.join(manifest.uri, entry.path)) for entry in manifest.files}


def flipped(data: bytes) -> bytes:
    return data[:700] + bytes([data[700] ^ 1]) + data[701:]


def test_an_undamaged_output_has_no_faults(root: str, archive: ArchiveRef) -> None:
    manifest = sharded(root, archive)
    assert verify.faults(manifest, full=False) == verify.faults(manifest, full=True) == []


@pytest.mark.parametrize(
    ("path", "damage", "state", "fast"),
    [
        (TAR, None, "is missing", True),
        (TAR, lambda data: b"", "has 0 bytes instead of", True),
        (TAR, lambda data: data[:-512], "bytes instead of", True),
        (TAR, flipped, "does not hold the bytes that were committed", False),
        (RECORD, None, "is missing", True),
        (RECORD, lambda data: data.replace(b"00001", b"00002"), "does not hold the bytes", True),
        ("artifacts/images.png", lambda data: b"", "has 0 bytes instead of", True),
    ],
)
def test_a_fault_is_named_and_the_same_command_repairs_only_it(
    root: str,
    archive: ArchiveRef,
    path: str,
    damage: Callable[[bytes], bytes] | None,
    state: str,
    fast: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = sharded(root, archive)
    whole, url = objects(manifest), uri.join(manifest.uri, path)
    if damage is None:
        uri.remove_tree(url, root)
    else:
        uri.write(url, damage(whole[path]))
    quick, found = verify.faults(manifest, full=False), verify.faults(manifest, full=True)
    assert [fault.entry.path for fault in found] == [path]
    assert state in found[0].damage
    assert quick == (found if fast else [])
    uri.write(uri.join(manifest.uri, "slurm/job.json"), b"{}")
    verify.withdraw(manifest, found)
    assert "slurm" not in uri.names(manifest.uri)  # that job is not the one that repairs
    with pytest.raises(InputError, match="has withdrawn it; run shard again, with the options that made it"):
        ShardManifest.read(manifest.uri)
    built = []
    pack = shard.pack
    monkeypatch.setattr(shard, "pack", lambda *given: built.append(TAR) or pack(*given))
    mended = sharded(root, archive)
    assert built == ([] if path.startswith("artifacts") else [TAR])
    assert mended.digest == manifest.digest
    assert objects(mended) == whole
    assert verify.faults(mended, full=True) == []


def test_a_shard_in_place_of_another_is_found(root: str, archive: ArchiveRef) -> None:
    manifest = sharded(root, archive)
    for path in (TAR, RECORD):  # one unit's tar and record, put over another's
        uri.write(uri.join(manifest.uri, path), uri.read(uri.join(manifest.uri, path.replace("00001", "00002"))))
    assert {fault.entry.path for fault in verify.faults(manifest, full=False)} >= {RECORD}
    assert {fault.entry.path for fault in verify.faults(manifest, full=True)} == {TAR, RECORD}


def test_after_an_interrupted_withdrawal_the_output_is_still_damaged(
    root: str, archive: ArchiveRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sharded(root, archive)
    uri.write(uri.join(manifest.uri, TAR), flipped(uri.read(uri.join(manifest.uri, TAR))))
    remove = uri.remove_tree

    def cut(url: str, within: str) -> None:
        if url.endswith("manifest.json"):
            raise KeyboardInterrupt
        remove(url, within)

    monkeypatch.setattr(uri, "remove_tree", cut)
    with pytest.raises(KeyboardInterrupt):
        verify.withdraw(manifest, verify.faults(manifest, full=True))
    assert [fault.entry.path for fault in verify.faults(manifest, full=False)] == [RECORD]


def test_outputs_of_a_url(root: str, archive: ArchiveRef) -> None:
    manifest = sharded(root, archive)
    uri.write(uri.join(root, "encode", "0123456789abcdef", "records", "rows-00000.json"), b"{}")  # work in progress
    for url in (manifest.url, manifest.uri, f"{manifest.uri}/", root):
        assert verify.outputs(url) == [Manifest.read(manifest.uri)]
    with pytest.raises(InputError, match="no finished output found"):
        verify.outputs(uri.join(root, "elsewhere"))


def test_an_unreadable_manifest_stands_for_itself_and_the_others_are_found(root: str, archive: ArchiveRef) -> None:
    manifest = sharded(root, archive)
    broken = uri.join(root, "shard", "0" * 16, "manifest.json")
    for data in (b"", b"{", b"[]", b"\xff\xfe", b"{}", uri.read(manifest.url)[:-40]):
        uri.write(broken, data)
        error, found = verify.outputs(root)
        assert isinstance(error, InputError)
        assert str(error).startswith(uri.parent(broken))
        assert "\n" not in str(error)
        assert found == Manifest.read(manifest.uri)
        (alone,) = verify.outputs(broken)
        assert str(alone) == str(error)


def test_an_object_that_cannot_be_read_is_named_beside_the_damaged_ones(tmp_path: Path, archive: ArchiveRef) -> None:
    manifest = sharded(str(tmp_path / "root"), archive)
    folder = Path(manifest.uri)
    (folder / RECORD).unlink()
    (folder / RECORD).symlink_to(folder / RECORD)
    (folder / TAR).write_bytes(b"")
    link, tar = verify.faults(manifest, full=False)
    assert (link.entry.path, link.compared, tar.entry.path, tar.compared) == (RECORD, False, TAR, True)
    assert link.damage.startswith("cannot be checked: ")


def test_what_nobody_committed_is_named(root: str, archive: ArchiveRef) -> None:
    manifest = sharded(root, archive)
    assert verify.uncommitted(manifest) == []
    checkpoint = "checkpoints/step-000000004/"
    entry = FileEntry(path=f"{checkpoint}state.safetensors", size=1, sha256="0" * 64)
    record = sealed(records.Record(files=(entry,)).model_dump_json().encode())
    ours = {"manifest.withdrawn.json": b"{}", "records/batch_size": b"8", entry.path: b"x", "slurm/job.log": b""}
    others = {"a.txt": b"", "records/evil.json": b"[]", "train/00009.tar": b"tar", f"{checkpoint}more": b"y"}
    for path, data in (ours | others | {f"{checkpoint}record.json": record}).items():
        uri.write(uri.join(manifest.uri, path), data)
    assert verify.uncommitted(manifest) == sorted(others)
    assert verify.faults(manifest, full=True) == []

    uri.write(uri.join(root, "mlflow.db"), b"")
    uri.write(uri.join(root, "lost+found/0123456789abcdef/manifest.json"), b"of the file system")
    assert verify.stray(root, frozenset(["mlflow.db"])) == []
    for path in ("notes.txt", "shard/loose", "shard/0123456789abcdef/train/00000.tar", "other/folder/file"):
        uri.write(uri.join(root, path), b"")
    strays = ["notes.txt", "other", "shard/0123456789abcdef", "shard/loose"]
    assert verify.stray(root, frozenset(["mlflow.db"])) == strays


@pytest.mark.parametrize("linked", ["records", "", ".."])
def test_withdrawing_never_follows_a_symbolic_link(tmp_path: Path, archive: ArchiveRef, linked: str) -> None:
    manifest = sharded(str(tmp_path / "root"), archive)
    folder = Path(manifest.uri) / linked
    if linked == "..":
        folder = Path(manifest.uri).parent
    (Path(manifest.uri) / TAR).write_bytes(b"")
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    with pytest.raises(StorageError, match="a symbolic link to .*elsewhere, and nothing is removed through links"):
        verify.withdraw(manifest, verify.faults(manifest, full=True))
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
    assert Path(manifest.url).exists()
    assert not Path(manifest.uri, verify.WITHDRAWN).exists()


def test_withdrawing_removes_links_themselves_and_nothing_behind_them(tmp_path: Path, archive: ArchiveRef) -> None:
    manifest = sharded(str(tmp_path / "root"), archive)
    (Path(manifest.uri) / TAR).write_bytes(b"")
    for path in (RECORD, "manifest.json"):
        (Path(manifest.uri) / path).rename(tmp_path / Path(path).name)
        (Path(manifest.uri) / path).symlink_to(tmp_path / Path(path).name)
    (Path(manifest.uri) / verify.WITHDRAWN).symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_text("mine")
    verify.withdraw(manifest, verify.faults(manifest, full=True))
    assert (tmp_path / Path(RECORD).name).exists()
    assert (tmp_path / "manifest.json").exists()
    assert (tmp_path / "mine").read_text() == "mine"
    assert not Path(manifest.uri, RECORD).is_symlink()
    assert not Path(manifest.url).is_symlink()
