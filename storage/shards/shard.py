"""The stage `shard`: the images of an archive are checked, shuffled and packed into webdataset tars.

Shard k of a split is slice k of a keyed permutation of the split's sorted files, so shards do not
depend on each other. Each is written under another name, synced, renamed and committed by its record. The bytes of
the image files are not changed, and the same images give the same tars, byte for byte.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from threading import Lock
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from webdataset.tariterators import tar_file_iterator

from storage import records, uri
from storage.archives.account import SplitAccount
from storage.archives.known import input_digests
from storage.archives.open import Archive, ArchiveRef, open_splits
from storage.config import Config, operational
from storage.errors import InputError
from storage.estimate import PlanContext, StageCost
from storage.header import FileEntry
from storage.images.grid import image_grid
from storage.images.transforms import load as load_image
from storage.manifest import Manifest, StageOutput
from storage.order import permutation
from storage.parallel import threads
from storage.pieces import pieces
from storage.shards.pack import Entry, Unreadable, pack, packed_size, timed
from storage.shards.runners import Local, Runner, local_workers
from storage.stage import StageDefinition
from storage.tracker import Tracker, publish

STAGE = "shard"
VERSION = 2

_SHEET, _THUMBNAIL, _COLUMNS = 64, 64, 8  # contact sheet: images, pixels of a side, images in a row
_GROUP_IMAGES = 4096  # most images of a group of shards
_MIN_GROUPS = 32  # fewer images make smaller groups, so that every worker has some
_PLANNING = Lock()


class ShardConfig(Config):
    """How images are packed into tars."""

    images_per_shard: int = Field(default=1024, ge=1)
    """Images in one tar; the last tar of a split may hold fewer."""
    seed: int = 0
    """Seed of the order that images are shuffled in."""
    max_unreadable: float = Field(default=0.001, ge=0, le=1)
    """Largest fraction of the images, 0 to 1, that may be unreadable and left out; more is an error."""
    min_side: int = Field(default=8, ge=1)
    """Shortest allowed side of an image, pixels; smaller images count as unreadable."""
    runner: Runner = operational(Local())
    """Workers that build the shards. If the root is no local disk, each holds one tar in memory."""


class ShardFile(Config):
    """A tar of a split."""

    path: str
    """Path below the stage's folder."""
    count: int
    """Images in the tar."""


class Split(Config):
    """The tars of one archive, in order."""

    count: int
    """Images in all tars."""
    shards: tuple[ShardFile, ...]


class ShardManifest(Manifest):
    """The manifest of the stage `shard`."""

    STAGE: ClassVar[str] = STAGE

    class_names: tuple[str, ...]
    """Names of the classes; a label is an index into them."""
    splits: dict[str, Split]
    """Splits by name: ``train`` and, if there are held-out images, ``held_out``."""
    unreadable: tuple[Unreadable, ...]
    """Files that were left out."""
    account: dict[str, SplitAccount] = Field(default_factory=dict)
    """What else each split's archive holds, and how it was understood. It is no part of the content."""


class ShardRecord(records.Record):
    """The commit record of one tar."""

    entries: tuple[Entry, ...]
    """The images, in the tar's order."""
    unreadable: tuple[Unreadable, ...]
    """Files of this slice that were left out."""


@dataclass(frozen=True)
class Sample:
    """An image of a split."""

    index: int
    """Index in the split, in the tars' order."""
    source_index: int
    """Index among the archive's sorted files."""
    name: str
    """Class name and path below the class."""
    label: int
    """Index of its class."""
    data: bytes
    """Bytes of the image file."""


class BuildResult(Config):
    """The result of building a group of shards."""

    images: int
    """Files that were read."""
    unreadable: tuple[Unreadable, ...]
    """Files that were left out."""


Build = Callable[[range], BuildResult]
"""Builds the shards of these numbers. It can be pickled, and called again it builds only the missing ones."""

Distribute = Callable[[Build, Sequence[range]], Iterable[BuildResult]]
"""Calls the function with each of the ranges, on any worker and in any order, and yields the results."""


@dataclass(frozen=True)
class _Task:
    """A tar to build."""

    split: str
    number: int
    indices: NDArray[np.int64]

    @property
    def tar(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"

    @property
    def record(self) -> str:
        return f"{records.FOLDER}/{self.split}-{self.number:05d}.json"


@dataclass(frozen=True)
class _Plan:
    """The archives by split, and all tars to build from them."""

    archives: dict[str, Archive]
    tasks: list[_Task]


def run(
    config: ShardConfig,
    archive: ArchiveRef,
    *,
    out: StageOutput,
    tracker: Tracker,
    distribute: Distribute | None = None,
) -> ShardManifest:
    """Build the missing tars and commit the stage.

    Args:
        config: the stage's config.
        archive: the images.
        out: the stage's output.
        tracker: receives progress and the contact sheet.
        distribute: runs groups of shards on workers; by default on threads of this process.

    Raises:
        InputError: an archive is unusable, has changed since the output was named, or has more
            unreadable images than the config allows. Shards that are built by then stay.
        StorageError: bytes cannot be read or written.
    """
    archive = archive.absolute()
    try:
        plan = _plan(config, archive, out)
        _build_all(config, archive, plan, out, tracker, distribute or partial(_in_threads, config.runner))
        return _finish(plan, out, tracker)
    finally:
        _planned.cache_clear()  # a plan of a million images is large


def build(config: ShardConfig, archive: ArchiveRef, out: StageOutput, numbers: range) -> BuildResult:
    """Build the shards of these numbers that are not committed, in any process that can read the archive.

    Each process lists the archive once.

    Raises:
        InputError: the archive has changed since the output was named.
        StorageError: bytes cannot be read or written.
    """
    plan = _plan(config, archive, out)
    tasks = plan.tasks[numbers.start : numbers.stop]
    left_out = [item for task in tasks for item in _build(config, plan.archives[task.split], out, task)]
    return BuildResult(images=sum(len(task.indices) for task in tasks), unreadable=tuple(left_out))


def read_images(manifest: ShardManifest, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The images of a split from index start up to stop, in the tars' order.

    Only the tars that hold these images are read, each completely and compared with its hash.

    Raises:
        InputError: there is no such split.
        StorageError: a tar or its record is missing or damaged; the line names it.
    """
    if split not in manifest.splits:
        raise InputError(f"{uri.redact(manifest.uri)}: has no split {split!r}, only {', '.join(manifest.splits)}")
    first = 0
    for number, shard in enumerate(manifest.splits[split].shards):
        last = first + shard.count
        if last > start and (stop is None or first < stop):
            samples = _read_shard(manifest, _Task(split, number, np.empty(0, np.int64)), first)
            yield from (item for item in samples if start <= item.index and (stop is None or item.index < stop))
        first = last


def _plan(config: ShardConfig, archive: ArchiveRef, out: StageOutput) -> _Plan:
    """The plan, made once a process even if threads ask at the same time: it lists the archive."""
    with _PLANNING:
        return _planned(config.images_per_shard, config.seed, archive, tuple(out.header.inputs.items()))


@lru_cache(maxsize=1)
def _planned(images_per_shard: int, seed: int, archive: ArchiveRef, inputs: tuple[tuple[str, str], ...]) -> _Plan:
    archives = open_splits(archive)
    for split, source in archives.items():
        if dict(inputs).get(split, source.digest) != source.digest:
            raise InputError(f"the {split} archive has changed since the run began; run the same command again")
    orders = {split: permutation(seed, 0, len(source.members)) for split, source in archives.items()}
    tasks = [
        _Task(split, number, order[start : start + images_per_shard])
        for split, order in orders.items()
        for number, start in enumerate(range(0, len(order), images_per_shard))
    ]
    return _Plan(archives, tasks)


def _groups(config: ShardConfig, count: int) -> list[range]:
    """The numbers of all shards in groups, each for one call of a worker.

    Larger groups cost fewer calls; smaller groups keep all workers busy to the end.
    """
    size = max(1, min(_GROUP_IMAGES // config.images_per_shard, -(-count // _MIN_GROUPS)))
    return [range(count)[start : start + size] for start in range(0, count, size)]


def _in_threads(runner: Runner, build: Build, groups: Sequence[range]) -> Iterator[BuildResult]:
    with threads(local_workers(runner)) as pool:
        yield from pool.map(build, groups)


def _build_all(
    config: ShardConfig, archive: ArchiveRef, plan: _Plan, out: StageOutput, tracker: Tracker, distribute: Distribute
) -> None:
    total = sum(len(task.indices) for task in plan.tasks)
    done, unreadable = 0, list[Unreadable]()
    for result in distribute(partial(build, config, archive, out), _groups(config, len(plan.tasks))):
        done += result.images
        unreadable += result.unreadable
        _check_limit(unreadable, done, total, config.max_unreadable)
        tracker.progress(done, total, "images")


def _build(config: ShardConfig, source: Archive, out: StageOutput, task: _Task) -> tuple[Unreadable, ...]:
    """Build one tar unless it is committed; return the files that were left out of it."""
    record = records.load(out, task.record, ShardRecord)
    if record is None:
        replace = uri.exists(out.url(task.record))
        size = packed_size([source.members[index].size or 0 for index in task.indices])
        with pieces(out.url(task.tar), size) as tar:
            entries, unreadable = pack(tar, source, task.split, task.indices, config.min_side)
        file = FileEntry(path=task.tar, size=tar.size, sha256=tar.sha256)
        record = ShardRecord(files=(file,), entries=entries, unreadable=unreadable)
        records.commit(out, task.record, record, replace=replace)
    return record.unreadable


def _finish(plan: _Plan, out: StageOutput, tracker: Tracker) -> ShardManifest:
    """Check every record against its tar and commit the stage. Only one record is in memory at a time."""
    train, shown, labels = plan.archives["train"], tuple[Entry, ...](), set[int]()
    files, unreadable = list[FileEntry](), list[Unreadable]()
    shards: dict[str, list[ShardFile]] = {split: [] for split in plan.archives}
    done = records.load_all(out, [task.record for task in plan.tasks], ShardRecord)
    for task, (record, entry) in zip(plan.tasks, done, strict=True):
        shards[task.split].append(ShardFile(path=task.tar, count=len(record.entries)))
        files += [entry, *record.files]
        unreadable += record.unreadable
        if task.split == "train":
            labels |= {image.label for image in record.entries}
            shown = shown or record.entries[:_SHEET]
    _check_classes(train, labels)
    splits = {split: _split(split, found) for split, found in shards.items()}
    counts = {
        "images": sum(split.count for split in splits.values()),
        "unreadable": len(unreadable),
        "classes": len(train.class_names),
        "shards": len(plan.tasks),
    }
    files.append(publish(out, tracker, "images.png", _contact_sheet(train, shown)))
    found = {"class_names": train.class_names, "splits": splits, "unreadable": tuple(unreadable)}
    return out.commit(ShardManifest, files, counts=counts, account=_account(plan.archives), **found)


def _account(archives: Mapping[str, Archive]) -> dict[str, SplitAccount]:
    return {split: source.account for split, source in archives.items()}


def _check_limit(unreadable: list[Unreadable], done: int, total: int, limit: float) -> None:
    if len(unreadable) <= limit * total:
        return
    first = "; ".join(f"{item.split} {item.name}: {item.reason}" for item in unreadable[:3])
    raise InputError(
        f"{len(unreadable):,} of the first {done:,} images are unreadable, more than shard.max_unreadable = "
        f"{limit:g} of {total:,} allows; repair or remove them, or raise shard.max_unreadable: {first}"
    )


def _check_classes(train: Archive, labels: set[int]) -> None:
    empty = [name for label, name in enumerate(train.class_names) if label not in labels]
    if empty:
        raise InputError(f"class {empty[0]!r}: none of its files is a readable image; repair or remove it")


def _split(name: str, shards: list[ShardFile]) -> Split:
    count = sum(shard.count for shard in shards)
    if not count:
        raise InputError(f"the {name} archive has no readable image")
    return Split(count=count, shards=tuple(shards))


def _contact_sheet(source: Archive, entries: Sequence[Entry]) -> bytes:
    members = [source.members[entry.source_index] for entry in entries]
    with threads(0) as pool:
        thumbnails = list(pool.map(lambda member: load_image(source.read(member), _THUMBNAIL), members))
    return image_grid(np.stack(thumbnails), _COLUMNS, gap=2)


def _read_shard(manifest: ShardManifest, task: _Task, first: int) -> Iterator[Sample]:
    entries = records.parse(manifest.read_object(task.record), ShardRecord).entries
    tar = io.BytesIO(manifest.read_object(task.tar))
    images = tar_file_iterator(tar, select_files=lambda name: not name.endswith(".cls"))
    for position, (entry, image) in enumerate(zip(entries, images, strict=True)):
        yield Sample(first + position, entry.source_index, entry.name, entry.label, image["data"])


def estimate(config: ShardConfig, archive: ArchiveRef, plan: PlanContext) -> StageCost:
    """The cost of packing the archive.

    Raises:
        InputError: as `open_archive`.
        StorageError: an image cannot be read.
    """
    archives = open_splits(archive)
    train = archives["train"]
    measured = cache(lambda: timed(train, local_workers(config.runner)))
    counts = {split: len(source.members) for split, source in archives.items()}
    shards, images = sum(-(-count // config.images_per_shard) for count in counts.values()), sum(counts.values())
    members = (member for source in archives.values() for member in source.members)
    listed = plan.rate("list", lambda: images / sum(source.seconds for source in archives.values()))
    packed = plan.rate("shard", lambda: measured().packed)
    plan.rate("load", lambda: measured().decoded)  # which the next stages need
    splits = {split: Split(count=count, shards=()) for split, count in counts.items()}
    return StageCost(
        images=images,
        objects=2 * shards + 2,
        size=packed_size([member.size or round(measured().size) for member in members]),
        units=shards,
        done=plan.records(),
        seconds=images / listed + images / packed,
        leaves={"class_names": train.class_names, "splits": splits, "unreadable": (), "account": _account(archives)},
    )


DEFINITION = StageDefinition(
    ShardConfig,
    ShardManifest,
    VERSION,
    run,
    lambda _, archive: input_digests(archive),
    estimate,
    {
        "list": "files of the archive listed in a second",
        "shard": "images read, checked and packed in a second, on all cores",
        "load": "images read and decoded in a second, on all cores",
    },
)
