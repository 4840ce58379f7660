"""Random archives against an obvious reading: nothing is dropped, mixed or misnamed."""

from collections import Counter, defaultdict
from pathlib import Path

import fsspec
import obvious_reading
import pytest
from obvious_reading import Reading, is_usable
from random_archives import Part
from random_cases import random_case

from storage.archives.folder import open_images
from storage.archives.known import input_digests
from storage.archives.open import Archive, ArchiveRef, open_splits
from storage.errors import InputError
from storage.manifest import stage_output
from storage.shards import shard
from storage.shards.runners import Local
from storage.shards.shard import ShardConfig, ShardManifest, read_images
from storage.tracker import NullTracker

QUICK, ALL = range(24), range(24, 124)


def read(part: Part) -> Reading:
    reading: Reading = getattr(obvious_reading, part.kind)(part)
    groups = defaultdict[str, list[bytes]](list)
    for class_name, _, data in reading.images:
        groups[class_name].append(data)
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, part.images.values()))  # the readings agree
    return reading


def check_listing(archive: Archive, reading: Reading) -> None:
    """Every image is listed once, with its class, and everything else is counted with its reason."""
    found, expected = Counter(), Counter()
    named = all(name is not None for _, name, _ in reading.images)
    for member in archive.members:
        class_name, _, name = member.name.partition("/")
        assert archive.class_names[member.label] == class_name
        found[class_name, name if named else None, archive.read(member)] += 1
    expected.update(reading.images)
    assert found == expected
    passed = archive.account.passed_over
    assert Counter({item.reason.split()[0].strip(":,"): item.count for item in passed}) == reading.passed


def check_shards(manifest: ShardManifest, split: str, reading: Reading) -> None:
    """Every image that can be read is in a shard, and every other file is listed with a reason."""
    usable = Counter((name, data) for name, _, data in reading.images if is_usable(data))
    packed = Counter((manifest.class_names[s.label], s.data) for s in read_images(manifest, split))
    assert packed == usable
    left_out = [item for item in manifest.unreadable if item.split == split]
    assert all(item.reason for item in left_out)
    rest = Counter(name for name, _, data in reading.images if not is_usable(data))
    assert Counter(item.name.partition("/")[0] for item in left_out) == rest


def check_reference(part: Part) -> None:
    """Every image with a class is also one of a reference folder, but for those that are named as texts."""
    listed = Counter(Path(image.location).read_bytes() for image in open_images(part.url))
    usable = Counter(data for _, name, data in read(part).images if is_usable(data) and not name.endswith(".txt"))
    assert usable <= listed


def run(seed: int, folder: Path) -> None:
    splits = random_case(seed, folder)
    ref = reference(splits)
    if seed % 4 == 1 and not any(part.kind == "folder" or "x::y" in part.images for part in splits.values()):
        ref = on_memory(folder, ref)
    refused = next((part.refused for part in splits.values() if part.refused is not None), None)
    if refused is not None:
        with pytest.raises(InputError) as caught:
            open_splits(ref)
        assert refused in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    for part in splits.values():
        if part.kind == "folder":
            check_reference(part)
    readings = {split: read(part) for split, part in splits.items()}
    archives = open_splits(ref)
    assert archives["train"].class_names == tuple(sorted({name for name, _, _ in readings["train"].images}))
    for split, reading in readings.items():
        check_listing(archives[split], reading)
    manifest = sharded(ref, folder / "runs")
    assert manifest.class_names == archives["train"].class_names
    for split, reading in readings.items():
        assert manifest.account[split] == archives[split].account
        check_shards(manifest, split, reading)


def reference(splits: dict[str, Part]) -> ArchiveRef:
    held_out = splits.get("held_out")
    labels = str(held_out.labels) if held_out and held_out.labels else None
    return ArchiveRef(train=splits["train"].url, held_out=held_out.url if held_out else None, held_out_labels=labels)


def on_memory(folder: Path, ref: ArchiveRef) -> ArchiveRef:
    """The same files on a store that is not the local disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fsspec.filesystem("memory").pipe_file(f"/root/{path.relative_to(folder)}", path.read_bytes())
    return ArchiveRef(**{name: url and url.replace(str(folder), "memory://root") for name, url in ref})


def sharded(ref: ArchiveRef, root: Path) -> ShardManifest:
    config = ShardConfig(images_per_shard=3, max_unreadable=1, runner=Local(count=1))
    out = stage_output(str(root), shard.STAGE, shard.VERSION, config, parents={}, inputs=input_digests(ref))
    return shard.run(config, ref, out=out, tracker=NullTracker())


@pytest.mark.parametrize("seed", QUICK)
def test_nothing_is_dropped_mixed_or_misnamed(seed: int, tmp_path: Path, memory: str) -> None:
    run(seed, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("seed", ALL)
def test_a_hundred_archives(seed: int, tmp_path: Path, memory: str) -> None:
    run(seed, tmp_path)
