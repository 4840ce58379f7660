"""Garbage is what a slow walk finds, and its deletion survives kills."""

import os
import random
import signal
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
from outputs import files, made, planned, twenty_recipes

from storage import uri, verify
from storage.collect import Garbage, delete, garbage
from storage.errors import StorageError
from storage.manifest import BEGUN, MANIFEST, Manifest, key_of
from storage.root import State, outputs

OTHERS = frozenset(["running"])
PAGES = ("reports",)
SEED = 3


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return str(tmp_path / "root") if request.param == "local" else memory


def found(root: str, kept: Collection[str] = (), seconds: float = 0, working: Collection[str] = ()) -> Garbage:
    reasons = dict.fromkeys(kept, "kept")
    kinds = {"pages": PAGES, "first": ("shard", "references")}
    return garbage(outputs(root, OTHERS), reasons, **kinds, seconds=seconds, working=working)


def goes(found: Garbage) -> list[str]:
    return [each.key for each in found.outputs]


def collect(root: str, kept: Collection[str]) -> list[str]:
    return delete(root, found(root, kept), lambda _: None)


def needed(kept: Collection[str], root: str) -> set[str]:
    """Each output that stays, as `verify` walks from it, and pages that show nothing else."""
    stay = {key_of(each.uri) for key in kept for each in verify.outputs(uri.join(root, key))}
    for page in uri.names(uri.join(root, "reports")):
        shown = verify.outputs(uri.join(root, "reports", page))[1:]
        if all(key_of(each.uri) in stay for each in shown):
            stay.add(f"reports/{page}")
    return stay


def everything(root: str) -> set[str]:
    return {key_of(each.uri) for each in verify.outputs(root)}


def check_sound(root: str) -> None:
    for each in verify.outputs(root):
        assert isinstance(each, Manifest), each
        assert verify.faults(each, full=True) == []


def test_what_goes_is_what_a_slow_walk_does_not_reach(root: str) -> None:
    keys = [key_of(each.uri) for each in twenty_recipes(root)]
    rng, before = random.Random(SEED), everything(root)
    assert len(before) == 20 + 14 + 9 + 4 + 2 + 1 + 3
    for count in (0, 1, 2, 5, 20):
        kept = rng.sample(keys, count)
        assert set(goes(found(root, kept))) == before - needed(kept, root)
    kept = [*rng.sample(keys, 3), rng.choice([key for key in before if key.startswith("train/")])]
    stay = needed(kept, root)
    assert collect(root, kept) == []
    assert everything(root) == stay
    check_sound(root)
    assert goes(found(root, kept)) == []


def test_children_go_before_what_they_were_made_from(root: str) -> None:
    twenty_recipes(root)
    order = {each.key: place for place, each in enumerate(found(root).outputs)}
    assert all(order[each.key] < order[key] for each in found(root).outputs for key in each.reads)


def removals(root: str, kept: Collection[str], killed_at: int) -> int:
    """Collect in a process that is killed as it removes or moves a file for that time; return its exit code."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(name: str, _: tuple[object, ...]) -> None:
            nonlocal count
            if name in ("os.remove", "os.rmdir", "os.rename"):
                count += 1
                if count == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        collect(root, kept)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("kills", [(1,), (2,), (17,), (40,), (60,), (150,), (45, 45, 45)])
def test_a_kill_leaves_what_is_whole_and_the_next_call_ends_as_an_undisturbed_one(
    tmp_path: Path, kills: tuple[int, ...]
) -> None:
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    for root in (killed, calm):
        keys = [key_of(each.uri) for each in twenty_recipes(str(root))]
    kept = [keys[0], keys[13]]
    collect(str(calm), kept)

    for removal in kills:
        assert removals(str(killed), kept, removal) == -signal.SIGKILL
        check_sound(str(killed))
        found(str(killed), kept, seconds=3600)  # it stays for an hour, and it is known what it was made from
    assert removals(str(killed), kept, 0) == 0
    check_sound(str(killed))
    assert files(killed) == files(calm)


def test_what_is_young_stays_with_what_it_was_made_from(root: str) -> None:
    shards = made(planned(root, "shard"))
    latents = planned(root, "encode", shards=shards)
    latents.begin()
    assert goes(found(root)) == [key_of(latents.uri), key_of(shards.uri)]
    nothing = found(root, seconds=3600)
    assert goes(nothing) == []
    assert nothing.kept == {key_of(latents.uri): "young", key_of(shards.uri): "young"}


def test_what_work_in_progress_is_made_from_stays(root: str) -> None:
    shards = made(planned(root, "shard"))
    latents = planned(root, "encode", shards=shards)
    latents.begin()
    assert goes(found(root, [key_of(latents.uri)])) == []


def test_what_a_withdrawn_output_was_made_from_stays(root: str) -> None:
    shards = made(planned(root, "shard"))
    latents = made(planned(root, "encode", shards=shards))
    checkpoint = made(planned(root, "train", latents=latents))
    verify.withdraw(latents, [])
    assert goes(found(root, [key_of(checkpoint.uri)])) == []
    assert [each.state for each in found(root).outputs] == [State.FINISHED, State.WITHDRAWN, State.FINISHED]
    collect(root, [])
    assert outputs(root, OTHERS) == []


def test_where_nobody_knows_what_an_output_was_made_from_nothing_goes(root: str) -> None:
    shards = made(planned(root, "shard"))
    latents = planned(root, "encode", shards=shards)
    latents.put("records/0.json", b"{}")
    with pytest.raises(StorageError, match=r"encode/.*: stays \(kept\), but it is unfinished, so nobody knows what"):
        found(root, [key_of(latents.uri)])
    uri.write(latents.url(MANIFEST), b"{}")
    with pytest.raises(StorageError, match="its manifest does not end in the hash of its bytes"):
        found(root, [key_of(latents.uri)])
    assert goes(found(root)) == [key_of(latents.uri), key_of(shards.uri)]


def test_of_what_is_made_from_no_output_nothing_need_be_known(root: str) -> None:
    for stage in ("shard", "references"):
        planned(root, stage).put("half", b"of it")
    assert len(found(root, seconds=3600).kept) == 2
    collect(root, [])
    assert outputs(root, OTHERS) == []


def test_unfinished_work_to_which_somebody_writes_meanwhile_is_left(root: str) -> None:
    shards, other = made(planned(root, "shard")), made(planned(root, "shard", 1))
    latents = planned(root, "encode", shards=shards)
    latents.begin()
    before = found(root)
    latents.put("data", b"more")
    assert delete(root, before, lambda _: None) == [latents.uri, shards.uri]
    assert {each.key for each in outputs(root, OTHERS)} == {key_of(latents.uri), key_of(shards.uri)}
    assert other.folder_name not in uri.names(uri.join(root, "shard"))


def test_temporary_files_of_killed_writers_go(tmp_path: Path) -> None:
    root = str(tmp_path)
    shards = made(planned(root, "shard"))
    left = Path(shards.uri, "train", f".00001.tar.{'a' * 32}.tmp")
    left.parent.mkdir()
    left.write_bytes(b"half of it")
    Path(shards.uri, ".hidden.tmp").write_bytes(b"not ours")
    planned(root, "shard").begin()  # as if the writer had been killed behind the manifest
    key, begun = key_of(shards.uri), Path(shards.uri, BEGUN)
    assert found(root, [key], working={key}).temporary == found(root, [key], seconds=3600).temporary == {}
    assert found(root, [key]).temporary == {str(left): 10, str(begun): begun.stat().st_size}
    collect(root, [key])
    assert not left.exists()
    assert not begun.exists()
    assert Path(shards.uri, ".hidden.tmp").exists()
    check_sound(root)


@pytest.mark.parametrize("linked", ["shard", "output"])
def test_what_lies_behind_a_link_stays(tmp_path: Path, linked: str) -> None:
    root = tmp_path / "root"
    shards = made(planned(str(root), "shard"))
    place = Path(shards.uri) if linked == "output" else Path(shards.uri).parent
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert found(str(root)).kept == {key_of(shards.uri): "behind a symbolic link"}
    collect(str(root), [])
    assert Manifest.read(shards.uri).digest == shards.digest


def test_nothing_but_outputs_goes(root: str) -> None:
    made(planned(root, "shard"))
    mine = ("shard/notes.txt", "notes/0123", "running/0123456789abcdef/a", ".hidden/0123456789abcdef/a")
    for path in mine:
        uri.write(uri.join(root, path), b"mine")
    collect(root, [])
    assert uri.tree(root) == sorted(mine)


def test_a_manifest_that_makes_a_circle_is_refused(root: str) -> None:
    one, other = planned(root, "shard"), planned(root, "encode")
    for out, source in ((one, other), (other, one)):
        parent = out.manifest(Manifest).as_parent().model_copy(update={"digest": source.header.digest})
        header = out.header.model_copy(update={"parents": {"x": parent.model_copy(update={"uri": source.uri})}})
        out.model_copy(update={"header": header}).commit(Manifest, [])
    with pytest.raises(StorageError, match="was made from itself"):
        found(root)
