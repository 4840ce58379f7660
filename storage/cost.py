"""What making an output has cost: device-seconds, peak memory and energy, over all ranks and all attempts.

A device is what one rank works on: a GPU, or without one its share of the processors. Each rank of each attempt keeps a
record in the output's folder ``cost`` and writes it again every `EVERY_SECONDS`; the manifest has the sum. So of a rank
that was killed all counts but what it did since its last record.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol
from uuid import uuid4

from pydantic import Field

from storage import uri
from storage.config import Config
from storage.errors import one_line
from storage.parallel import threads
from storage.patience import given_up
from storage.seal import opened, sealed

LOGGER = logging.getLogger(__name__)
FOLDER = "cost"
"""Folder of the records, below the stage's folder."""
EVERY_SECONDS = 30.0
_meters: dict[str, list["_Meter"]] = {}
"""What is measured in this process, by the folder of the output."""


class Gauge(Protocol):
    """Measures one rank from the moment it is made."""

    device: str
    """Name of what the rank works on."""
    unread: str
    """Why the energy cannot be read; empty if it can."""

    def peak_memory(self) -> int:
        """Most bytes of the device's memory so far."""

    def joules(self) -> float:
        """Energy of the device so far, if it can be read."""


class Part(Config):
    """What one rank of one attempt has cost so far."""

    rank: int
    device: str
    """Name of what it works on."""
    began: datetime
    device_seconds: float
    peak_memory: int
    """In bytes."""
    energy_joules: float | None
    """None if it cannot be read."""
    energy_unread: str = ""
    """Why it cannot be read."""


class Cost(Config):
    """What an output has cost."""

    device_seconds: float = Field(ge=0)
    """Seconds of all ranks of all attempts, each from its start to the commit or its last record."""
    devices: tuple[str, ...]
    """Names of what they worked on."""
    attempts: int
    """How many times the work was begun: 1 if nothing was killed, failed or repaired."""
    peak_memory: int
    """Bytes: the most of any rank, on its GPU as torch allocates it, or without one of its process."""
    energy_joules: float | None
    """Energy of the GPUs, or without them of the machines' processors, whatever else these did. None if that of one
    rank cannot be read."""
    energy_unread: str = ""
    """Why it cannot be read."""


@contextmanager
def metered(folder: str, gauge: Gauge, rank: int = 0) -> Iterator[None]:
    """Keep the record of this rank's cost for the length of the block. An error of the store is only logged.

    Args:
        folder: of the output that the rank makes.
        gauge: measures the rank.
        rank: its number.
    """
    meter = _Meter(folder, gauge, rank)
    _meters.setdefault(folder, []).append(meter)
    ended = threading.Event()
    thread = threading.Thread(target=meter.note_until, args=[ended], name="cost", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        with given_up():  # the work has ended, and does not wait for a store
            thread.join()
            meter.note()
        _meters[folder].remove(meter)


def note() -> None:
    """Bring the records of this process up to date."""
    for meter in [meter for meters in _meters.values() for meter in meters]:
        meter.note()


def spent(folder: str) -> Cost | None:
    """What an output has cost until now, by its records; None without any.

    Raises:
        StorageError: the store does not answer.
    """
    for meter in _meters.get(folder, ()):
        meter.note()
    return total(parts(folder))


def parts(folder: str) -> list[Part]:
    """The records of an output's ranks and attempts. One that a kill has left half-written is passed over.

    Raises:
        StorageError: the store does not answer.
    """
    names = [name for name in uri.names(uri.join(folder, FOLDER)) if name.endswith(".json")]
    urls = [uri.join(folder, FOLDER, name) for name in names]
    with threads(16) as pool:
        found = pool.map(_part, urls)
        return [part for part in found if part is not None]


def total(found: Sequence[Part]) -> Cost | None:
    """The sum of records; None without any."""
    if not found:
        return None
    joules = [part.energy_joules for part in found if part.energy_joules is not None]
    unread = [part.energy_unread for part in found if part.energy_joules is None]
    return Cost(
        device_seconds=round(sum(part.device_seconds for part in found), 3),
        devices=tuple(sorted({part.device for part in found})),
        attempts=max(1, sum(part.rank == 0 for part in found)),
        peak_memory=max(part.peak_memory for part in found),
        energy_joules=None if unread else round(sum(joules), 3),
        energy_unread="; ".join(dict.fromkeys(unread)),
    )


class _Meter:
    def __init__(self, folder: str, gauge: Gauge, rank: int) -> None:
        self._folder, self._gauge, self._rank = folder, gauge, rank
        self._url = uri.join(folder, FOLDER, f"{uuid4().hex}.json")
        self._began, self._start = datetime.now(UTC), time.monotonic()
        self._lock = threading.Lock()
        self._failing = False

    def note_until(self, ended: threading.Event) -> None:
        self.note()
        while not ended.wait(EVERY_SECONDS):
            self.note()

    def note(self) -> None:
        with self._lock:
            try:
                uri.write(self._url, sealed(self._part().model_dump_json(indent=1).encode()))
            except Exception as error:  # of the store or a driver: what work costs must not end it
                if not self._failing:
                    LOGGER.warning("the record of what this rank costs is not written: %s", one_line(error))
                self._failing = True
            else:
                self._failing = False

    def _part(self) -> Part:
        unread = self._gauge.unread
        return Part(
            rank=self._rank,
            device=self._gauge.device,
            began=self._began,
            device_seconds=round(time.monotonic() - self._start, 3),
            peak_memory=self._gauge.peak_memory(),
            energy_joules=None if unread else round(self._gauge.joules(), 3),
            energy_unread=unread,
        )


def _part(url: str) -> Part | None:
    data = uri.read_if_there(url)
    try:
        return None if data is None else Part.model_validate_json(opened(data))
    except ValueError as error:
        LOGGER.warning("%s is not counted: %s", uri.redact(url), one_line(error))
        return None
