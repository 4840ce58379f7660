"""The stage `shard`: images of an archive, checked and shuffled, become webdataset tars.

Shard k of a split is slice k of a keyed permutation of its sorted files, so shards are independent
of each other: each is built in memory, put whole and committed by its record. The image bytes are
passed through, and the same images give the same tars, byte for byte.
"""

import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import webdataset
from numpy.typing import NDArray
from pydantic import Field

from storage import records, uri
from storage.archive import Archive, ArchiveRef, Member, open_archive
from storage.config import Config, operational
from storage.errors import InputError, StorageError
from storage.manifest import Manifest, StageOutput
from storage.order import permutation
from storage.parallel import threads
from storage.pictures import image_grid
from storage.tracking import Tracker, publish
from storage.transforms import UnreadableImage, inspect
from storage.transforms import load as load_image

STAGE = "shard"
VERSION = 1

_SHEET, _THUMBNAIL, _COLUMNS = 64, 64, 8  # images, pixels, images


class ShardConfig(Config):
    """How images are gathered into tars."""

    images_per_shard: int = Field(1024, ge=1)
    """Images in a tar; the last of a split may hold fewer."""
    seed: int = 0
    """Key of the order that images are dealt in."""
    max_unreadable: float = Field(0.001, ge=0, le=1)
    """Largest share of the images, from 0 to 1, that may be unreadable and left out."""
    min_side: int = Field(8, ge=1)
    """Shortest side of a usable image, pixels."""
    workers: int = operational(0, ge=0)
    """Threads, each building one shard at a time in memory; 0 means one for each core."""


class Unreadable(Config):
    """A file that was left out."""

    split: str
    """``train`` or ``held_out``."""
    name: str
    """Path below the archive."""
    reason: str
    """Why, in a few words."""


class ShardFile(Config):
    """One tar."""

    path: str
    """Path below the stage's folder."""
    count: int
    """Images in it."""


class Split(Config):
    """The tars of one archive."""

    count: int
    """Images in all of them."""
    shards: tuple[ShardFile, ...]


class ShardManifest(Manifest):
    """The images as tars."""

    STAGE: ClassVar[str] = STAGE

    class_names: tuple[str, ...]
    """The classes; a label is a position here."""
    splits: dict[str, Split]
    """By name: ``train`` and, if there are such images, ``held_out``."""
    unreadable: tuple[Unreadable, ...]
    """The files left out."""


class Entry(Config):
    """One image of a tar, as its record lists it."""

    source_index: int
    """Position among the archive's sorted files."""
    name: str
    """Path below the archive."""
    label: int
    extension: str
    """The format: ``jpg``, ``png``."""
    sha256: str
    """Hash of the image's bytes."""


class ShardRecord(records.Record):
    """The commit record of one tar."""

    entries: tuple[Entry, ...]
    """The images, in the tar's order."""
    unreadable: tuple[Unreadable, ...]
    """The files of this slice that were left out."""


@dataclass(frozen=True)
class Sample:
    """One image as it lies in a tar."""

    index: int
    """Position in the split, in the tars' order."""
    source_index: int
    """Position among the archive's sorted files."""
    name: str
    """Path below the archive."""
    label: int
    data: bytes
    """The image file's own bytes."""


@dataclass(frozen=True)
class _Task:
    """One tar to build."""

    split: str
    number: int
    indices: NDArray[np.int64]

    @property
    def tar(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"

    @property
    def record(self) -> str:
        return f"{records.FOLDER}/{self.split}-{self.number:05d}.json"


def input_digests(archive: ArchiveRef) -> dict[str, str]:
    """The digest of each archive by split.

    Raises:
        InputError: as `open_archive`.
    """
    return {split: source.digest for split, source in _opened(archive).items()}


def run(config: ShardConfig, archive: ArchiveRef, *, out: StageOutput, tracker: Tracker) -> ShardManifest:
    """Build the tars that are missing and commit the stage.

    Raises:
        InputError: an archive is unusable, has changed since the output was named, or has more
            unreadable images than the config allows; the shards built by then stay.
        StorageError: bytes could not be read or written.
    """
    archives = _opened(archive)
    for split, source in archives.items():
        if out.header.inputs.get(split, source.digest) != source.digest:
            raise InputError(f"the {split} archive has changed since this run began; run the same command again")
    tasks = [task for split, source in archives.items() for task in _tasks(config, split, source)]
    _build_all(config, archives, tasks, out, tracker)
    done = records.sealed(out, [task.record for task in tasks], ShardRecord)
    _check_classes(archives["train"], [r for (r, _), task in zip(done, tasks, strict=True) if task.split == "train"])
    splits = {split: _split(split, tasks, [record for record, _ in done]) for split in archives}
    sheet = publish(out, tracker, "images.png", _contact_sheet(archives["train"], done[0][0]))
    files = [sheet, *(entry for _, entry in done), *(file for record, _ in done for file in record.files)]
    unreadable = tuple(item for record, _ in done for item in record.unreadable)
    counts = {
        "images": sum(split.count for split in splits.values()),
        "unreadable": len(unreadable),
        "classes": len(archives["train"].class_names),
        "shards": len(tasks),
    }
    class_names = archives["train"].class_names
    return out.commit(
        ShardManifest, files, counts=counts, class_names=class_names, splits=splits, unreadable=unreadable
    )


def read_images(manifest: ShardManifest, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The images of a split in the tars' order, from position start up to stop.

    Only the tars that hold such positions are read, each whole and compared with its hash.

    Raises:
        InputError: there is no such split.
        StorageError: a tar or its record is missing or damaged; the line names it.
    """
    if split not in manifest.splits:
        raise InputError(f"{uri.redact(manifest.uri)}: no {split!r} images there, only {', '.join(manifest.splits)}")
    first = 0
    for number, shard in enumerate(manifest.splits[split].shards):
        last = first + shard.count
        if last > start and (stop is None or first < stop):
            samples = _read_shard(manifest, _Task(split, number, np.empty(0, np.int64)), first)
            yield from (item for item in samples if start <= item.index and (stop is None or item.index < stop))
        first = last


def _opened(archive: ArchiveRef) -> dict[str, Archive]:
    train = open_archive(archive.train)
    if archive.held_out is None:
        return {"train": train}
    held_out = open_archive(archive.held_out, train.class_names, archive.held_out_labels)
    return {"train": train, "held_out": held_out}


def _tasks(config: ShardConfig, split: str, source: Archive) -> list[_Task]:
    order = permutation(config.seed, 0, len(source.members))
    starts = range(0, len(order), config.images_per_shard)
    return [_Task(split, k, order[start : start + config.images_per_shard]) for k, start in enumerate(starts)]


def _build_all(
    config: ShardConfig, archives: Mapping[str, Archive], tasks: list[_Task], out: StageOutput, tracker: Tracker
) -> None:
    total = sum(len(task.indices) for task in tasks)
    done, unreadable = 0, list[Unreadable]()
    with threads(config.workers) as pool:
        found = pool.map(partial(_build, config, archives, out), tasks)
        for task, left_out in zip(tasks, found, strict=True):
            done += len(task.indices)
            unreadable += left_out
            _check_limit(unreadable, done, total, config.max_unreadable)
            tracker.progress(done, total, "images")


def _build(
    config: ShardConfig, archives: Mapping[str, Archive], out: StageOutput, task: _Task
) -> tuple[Unreadable, ...]:
    """Build one tar unless it is committed, and say which files were left out of it."""
    record = records.load(out, task.record, ShardRecord)
    if record is None:
        replace = uri.exists(out.url(task.record))
        data, entries, unreadable = _pack(archives[task.split], task, config.min_side)
        record = ShardRecord(files=(out.put(task.tar, data),), entries=entries, unreadable=unreadable)
        records.commit(out, task.record, record, replace=replace)
    return record.unreadable


def _pack(source: Archive, task: _Task, min_side: int) -> tuple[bytes, tuple[Entry, ...], tuple[Unreadable, ...]]:
    buffer = io.BytesIO()
    entries, unreadable = list[Entry](), list[Unreadable]()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="ditflow", group="ditflow") as tar:
        for index in map(int, task.indices):
            member = source.members[index]
            data = source.read(member)
            try:
                entry = _entry(index, member, data, min_side)
            except UnreadableImage as error:
                unreadable.append(Unreadable(split=task.split, name=member.name, reason=str(error)))
                continue
            tar.write({"__key__": f"{index:08d}", entry.extension: data, "cls": str(member.label).encode()})
            entries.append(entry)
    return buffer.getvalue(), tuple(entries), tuple(unreadable)


def _entry(index: int, member: Member, data: bytes, min_side: int) -> Entry:
    facts = inspect(data)
    if min(facts.width, facts.height) < min_side:
        raise UnreadableImage(f"{facts.width}x{facts.height} pixels, smaller than {min_side}")
    return Entry(
        source_index=index,
        name=member.name,
        label=member.label,
        extension=facts.extension,
        sha256=uri.sha256(data),
    )


def _check_limit(unreadable: list[Unreadable], done: int, total: int, limit: float) -> None:
    if len(unreadable) <= limit * total:
        return
    first = "; ".join(f"{item.split} {item.name}: {item.reason}" for item in unreadable[:3])
    raise InputError(
        f"{len(unreadable):,} of the first {done:,} images are unreadable, more than max_unreadable = {limit:g} "
        f"of {total:,} allows; mend or remove them, or raise the limit: {first}"
    )


def _check_classes(train: Archive, done: list[ShardRecord]) -> None:
    seen = {entry.label for record in done for entry in record.entries}
    empty = [name for label, name in enumerate(train.class_names) if label not in seen]
    if empty:
        raise InputError(f"class {empty[0]!r}: not one of its files is a readable image; mend or remove it")


def _split(split: str, tasks: list[_Task], done: list[ShardRecord]) -> Split:
    shards = tuple(
        ShardFile(path=task.tar, count=len(record.entries))
        for task, record in zip(tasks, done, strict=True)
        if task.split == split
    )
    count = sum(shard.count for shard in shards)
    if not count:
        raise InputError(f"the {split} archive has no readable image")
    return Split(count=count, shards=shards)


def _contact_sheet(source: Archive, record: ShardRecord) -> bytes:
    members = [source.members[entry.source_index] for entry in record.entries[:_SHEET]]
    return image_grid(np.stack([load_image(source.read(member), _THUMBNAIL) for member in members]), _COLUMNS, gap=2)


def _read_shard(manifest: ShardManifest, task: _Task, first: int) -> Iterator[Sample]:
    record = ShardRecord.model_validate_json(manifest.read_object(task.record))
    with tarfile.open(fileobj=io.BytesIO(manifest.read_object(task.tar)), mode="r:") as tar:
        for position, entry in enumerate(record.entries):
            file = tar.extractfile(f"{entry.source_index:08d}.{entry.extension}")
            if file is None:
                raise StorageError(f"{task.tar}: {entry.source_index:08d} is not a file")
            yield Sample(first + position, entry.source_index, entry.name, entry.label, file.read())
