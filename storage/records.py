"""Commit records: the proof that one unit of a stage's work is done.

A unit puts its objects whole and then its record, so a unit without a record, or with one that its
objects do not fit, is done again by the same command, and no other unit is.
"""

from typing import TypeVar

from pydantic import ValidationError

from storage import uri
from storage.config import Config
from storage.errors import StorageError
from storage.manifest import FileEntry, StageOutput

FOLDER = "records"
"""Where records lie, below a stage's folder."""


class Record(Config):
    """What one unit has put."""

    files: tuple[FileEntry, ...]
    """Its objects with size and hash."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


def load(out: StageOutput, path: str, kind: type[AnyRecord]) -> AnyRecord | None:
    """The record, or None when the unit is to be done: no record, not a whole one, or no objects of its sizes.

    Raises:
        StorageError: the record is there and cannot be read.
    """
    if not uri.exists(out.url(path)):
        return None
    try:
        record = kind.model_validate_json(uri.read(out.url(path)))
    except ValidationError:
        return None
    fits = all(uri.size(out.url(entry.path)) == entry.size for entry in record.files)
    return record if fits else None


def commit(out: StageOutput, path: str, record: Record, *, replace: bool) -> None:
    """Write the record of a unit whose objects are put.

    Args:
        out: the stage's folder.
        path: of the record.
        record: what was put.
        replace: an unfit record was there before the unit was done. Without one the record is
            created exclusively, so that two runs doing one unit at once notice each other.

    Raises:
        StorageError: another run has meanwhile committed other bytes for the unit, or the record
            cannot be written.
    """
    data = record.model_dump_json().encode()
    if replace:
        uri.write(out.url(path), data)
    elif not uri.create(out.url(path), data) and uri.read(out.url(path)) != data:
        where = uri.redact(out.url(path))
        raise StorageError(f"{where}: another run committed other bytes at the same time; delete it and run one again")


def sealed(out: StageOutput, paths: list[str], kind: type[AnyRecord]) -> list[tuple[AnyRecord, FileEntry]]:
    """All records of a stage, each checked against its objects, with their own entries.

    Raises:
        StorageError: a unit is not committed.
    """
    found = []
    for path in paths:
        record = load(out, path, kind)
        if record is None:
            raise StorageError(f"{uri.redact(out.url(path))}: not committed; run the same command again")
        data = uri.read(out.url(path))
        found.append((record, FileEntry(path=path, size=len(data), sha256=uri.sha256(data))))
    return found
