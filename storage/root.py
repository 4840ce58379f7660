"""The outputs of a root, finished or not: what they are, what they were made from, how large they are, and pins.

Only manifests are read, and of them only what every stage's has. The output of killed or running work has no manifest;
who began it has left `BEGUN` in its folder, and a withdrawn one its old manifest.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage import uri
from storage.errors import StorageError
from storage.header import Provenance, short_digest
from storage.manifest import BEGUN, MANIFEST, MAX_BYTES, WITHDRAWN
from storage.parallel import threads
from storage.seal import BrokenSealError, opened, sealed

PINS: Final = "pins"
"""Folder of the pins, in the root."""
READERS: Final = 32
"""Threads that wait for a store."""
_NAME = re.compile(r"[0-9a-f]{16}")


class State(StrEnum):
    """What a folder holds."""

    FINISHED = "finished"
    UNFINISHED = "unfinished"
    """Work that goes on, or that a kill or a fault has ended."""
    WITHDRAWN = "withdrawn"
    """``ditflow verify`` has found it damaged, and its stage has not repaired it yet."""
    DAMAGED = "damaged"
    """Its manifest cannot be read."""


class _Plain(BaseModel):
    """Quicker than a `Config`: no validators of our own."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Source(_Plain):
    """An output that another one was made from."""

    digest: str
    uri: str
    cached: bool = False
    """Kept for others too, and measured again when it is gone."""

    @property
    def key(self) -> str:
        """`Output.key` of the output."""
        return f"{uri.name(uri.parent(self.uri))}/{short_digest(self.digest)}"


class _File(_Plain):
    size: int


class Spent(_Plain):
    """`storage.cost.Cost` of an output."""

    device_seconds: float
    peak_memory: int
    energy_joules: float | None


class Facts(_Plain):
    """What manifests of all stages say, and a few fields that only some have."""

    stage: str
    version: int
    digest: str
    config: dict[str, Any]
    inputs: dict[str, str]
    parents: dict[str, Source]
    rerun: int = 0
    provenance: Provenance = Provenance()
    files: tuple[_File, ...] = ()
    counts: dict[str, int] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    code_version: str = ""
    created: datetime | None = None
    """When the manifest was written; None before."""
    cost: Spent | None = None
    distance: str | None = None
    """Of an evaluation: name of the distance with its feature extractor."""
    model_name: str | None = None
    model_version: int | None = None
    """Of a registration."""

    @property
    def size(self) -> int:
        """Bytes of the committed objects."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Output:
    """An output in a root."""

    root: str
    stage: str
    """Name of its stage's folder."""
    name: str
    """The first 16 digits of its digest."""
    state: State
    facts: Facts | None = field(default=None, compare=False, repr=False)
    """None if nobody knows them."""
    fault: str = ""
    """Why its manifest cannot be read."""

    @property
    def key(self) -> str:
        """Its path below the root."""
        return f"{self.stage}/{self.name}"

    @property
    def url(self) -> str:
        """Its folder."""
        return uri.join(self.root, self.stage, self.name)

    @property
    def parents(self) -> dict[str, str]:
        """`key` of each output that it was made from, by name; without those that are only kept for others too."""
        return {name: each.key for name, each in self._sources.items() if not each.cached}

    @property
    def reads(self) -> set[str]:
        """The keys of all outputs that it was made from."""
        return {each.key for each in self._sources.values()}

    @property
    def _sources(self) -> Mapping[str, Source]:
        return self.facts.parents if self.facts else {}


@dataclass(frozen=True)
class Usage:
    """What lies in a folder."""

    size: int = 0
    """In bytes, also of what was never committed."""
    newest: float = 0.0
    """When the last object was written, in seconds since 1970; infinite if the store does not say."""
    files: Sequence[str] = field(default=(), repr=False)
    """Paths below the folder."""


class Pin(_Plain):
    """A wish that an output be kept."""

    key: str
    """`Output.key` of the output."""
    reason: str
    who: str
    when: datetime


def folders(root: str) -> list[str]:
    """The names in a root, but for the folder that a file system keeps at its top for itself.

    Raises:
        StorageError: the store does not answer.
    """
    return [name for name in uri.names(root) if name != "lost+found"]


def outputs(root: str, others: Container[str]) -> list[Output]:
    """All outputs of a root, sorted by stage and name. In one of thousands they are read in threads.

    Args:
        root: folder of all outputs.
        others: names in the root that are no stages.

    Raises:
        StorageError: the store does not answer.
    """
    root = uri.absolute(root)
    stages = [stage for stage in folders(root) if stage not in others and not stage.startswith(".")]
    with threads(READERS if uri.local_path(root) is None else 1) as pool:
        found = pool.map(lambda stage: uri.names(uri.join(root, stage)), stages)
        places = [(stage, name) for stage, names in zip(stages, found, strict=True) for name in names]
        return list(
            pool.map(lambda place: output(root, *place), filter(lambda place: _NAME.fullmatch(place[1]), places))
        )


def output(root: str, stage: str, name: str) -> Output:
    """The output in a folder of a root.

    Raises:
        StorageError: the store does not answer.
    """
    folder = uri.join(root, stage, name)
    data = uri.read_if_there(uri.join(folder, MANIFEST))
    if data is not None:
        return _finished(root, stage, name, data)
    withdrawn = uri.read_if_there(uri.join(folder, WITHDRAWN))
    state = State.UNFINISHED if withdrawn is None else State.WITHDRAWN
    for known in (uri.read_if_there(uri.join(folder, BEGUN)), withdrawn):
        facts = None if known is None else _facts(known, stage, name)
        if isinstance(facts, Facts):
            return Output(root, stage, name, state, facts)
    return Output(root, stage, name, state)


def _finished(root: str, stage: str, name: str, data: bytes) -> Output:
    facts = _facts(data, stage, name)
    if isinstance(facts, Facts):
        return Output(root, stage, name, State.FINISHED, facts)
    return Output(root, stage, name, State.DAMAGED, fault=facts)


def _facts(data: bytes, stage: str, name: str) -> Facts | str:
    """What a manifest says, or why it is refused."""
    if len(data) > MAX_BYTES:
        return f"has {len(data):,} bytes"
    try:
        facts = Facts.model_validate_json(opened(data))
    except BrokenSealError as error:
        return str(error)
    except ValidationError:
        return "is not a manifest"
    same = (facts.stage, short_digest(facts.digest)) == (stage, name)
    return facts if same else f"belongs to {facts.stage}/{short_digest(facts.digest)}"


def usage(folder: str) -> Usage:
    """What lies in a folder.

    Raises:
        StorageError: the store does not answer.
    """
    found = uri.infos(folder)
    times = [_written(info) for info in found.values()]
    return Usage(sum(int(info["size"] or 0) for info in found.values()), max(times, default=0.0), tuple(found))


def usages(folders: Sequence[str]) -> list[Usage]:
    """`usage` of many folders."""
    with threads(READERS) as pool:
        return list(pool.map(usage, folders))


def _written(info: Mapping[str, Any]) -> float:
    """When an object was written, as its store says."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return float("inf")


def pins(root: str) -> list[Pin]:
    """The pins of a root.

    Raises:
        StorageError: one cannot be read.
    """
    folder = uri.join(uri.absolute(root), PINS)
    return [_pin(uri.join(folder, name)) for name in uri.names(folder) if name.endswith(".json")]


def _pin(url: str) -> Pin:
    try:
        return Pin.model_validate_json(opened(uri.read(url, uri.MAX_TEXT)))
    except ValueError as error:
        raise StorageError(f"{uri.redact(url)}: not a pin; delete it and pin the output again") from error


def pin(root: str, pinned: Pin) -> None:
    """Pin an output; one that is pinned gets the new reason.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    uri.write(_pin_url(root, pinned.key), sealed(pinned.model_dump_json(indent=1).encode()))


def unpin(root: str, key: str) -> bool:
    """Remove a pin; return whether there was one.

    Raises:
        StorageError: the store refuses.
    """
    url = _pin_url(root, key)
    there = uri.exists(url)
    uri.remove_tree(url, root)
    return there


def _pin_url(root: str, key: str) -> str:
    return uri.join(uri.absolute(root), PINS, f"{key.replace('/', '-')}.json")


def users(found: Sequence[Output]) -> dict[str, list[Output]]:
    """The outputs that were made from each one, by its key."""
    made: dict[str, list[Output]] = {}
    for each in found:
        for key in each.reads:
            made.setdefault(key, []).append(each)
    return made


def above(found: Mapping[str, Output], keys: Iterable[str]) -> set[str]:
    """The keys, and those of all that they were made from."""
    todo, reached = list(keys), set[str]()
    while todo:
        key = todo.pop()
        if key not in reached:
            reached.add(key)
            todo += found[key].reads if key in found else ()
    return reached
