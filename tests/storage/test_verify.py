from collections.abc import Callable
from pathlib import Path

import pytest

from storage import uri, verify
from storage.archives.open import ArchiveRef
from storage.errors import InputError
from storage.manifest import Manifest, stage_output
from storage.shards import shard
from storage.shards.runners import Threads
from storage.shards.shard import ShardConfig, ShardManifest
from storage.tracker import NullTracker

CONFIG = ShardConfig(images_per_shard=7, runner=Threads(count=2))
TAR, RECORD = "train/00001.tar", "records/train-00001.json"


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return str(tmp_path / "root") if request.param == "local" else memory


@pytest.fixture
def archive(tmp_path: Path, write_archive: Callable[..., Path]) -> ArchiveRef:
    return ArchiveRef(train=str(write_archive(tmp_path / "train", {"cat": 11, "dog": 12})))


def sharded(root: str, archive: ArchiveRef) -> ShardManifest:
    inputs = shard.input_digests(archive)
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
        uri.remove_tree(url)
    else:
        uri.write(url, damage(whole[path]))
    quick, found = verify.faults(manifest, full=False), verify.faults(manifest, full=True)
    assert [fault.entry.path for fault in found] == [path]
    assert state in found[0].damage
    assert quick == (found if fast else [])
    verify.withdraw(manifest, found)
    with pytest.raises(InputError, match="no finished output"):
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

    def cut(url: str) -> None:
        if url.endswith("manifest.json"):
            raise KeyboardInterrupt
        remove(url)

    monkeypatch.setattr(uri, "remove_tree", cut)
    with pytest.raises(KeyboardInterrupt):
        verify.withdraw(manifest, verify.faults(manifest, full=True))
    assert [fault.entry.path for fault in verify.faults(manifest, full=False)] == [RECORD]


def test_outputs_of_a_url(root: str, archive: ArchiveRef) -> None:
    manifest = sharded(root, archive)
    uri.write(uri.join(root, "encode", "0123456789abcdef", "records", "rows-00000.json"), b"{}")  # work in progress
    for url in (manifest.url, manifest.uri, f"{manifest.uri}/", root):
        assert [found.digest for found in verify.outputs(url)] == [manifest.digest]
    with pytest.raises(InputError, match="no finished output found"):
        verify.outputs(uri.join(root, "elsewhere"))
