"""What a stage may tell the outside world while it works. It never learns who listens."""

from collections.abc import Mapping
from typing import Protocol

from storage.manifest import FileEntry, StageOutput


class Tracker(Protocol):
    """A listener of one stage. No method raises, and none blocks for long."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Scalars at a step; what a step counts is the stage's own unit."""

    def artifact(self, name: str, data: bytes) -> None:
        """A file that people look at, such as ``grid.png``."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """How far the stage is, in units of its work."""


class NullTracker:
    """Nobody listens."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Drop the metrics."""

    def artifact(self, name: str, data: bytes) -> None:
        """Drop the artifact."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Drop the progress."""


def publish(out: StageOutput, tracker: Tracker, name: str, data: bytes) -> FileEntry:
    """Keep a file that people look at among the stage's objects, and show it to the tracker.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    entry = out.put(f"artifacts/{name}", data)
    tracker.artifact(name, data)
    return entry
