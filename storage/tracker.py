"""What a stage reports while it works: metrics, artifacts and progress. Where they go is not its concern."""

from collections.abc import Mapping
from typing import Protocol

from storage.header import FileEntry
from storage.manifest import StageOutput


class Tracker(Protocol):
    """Receives the reports of one stage. No method raises, and none blocks for long."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Scalars at a step; the stage defines what a step counts."""

    def artifact(self, name: str, data: bytes) -> None:
        """A file for people to look at, such as ``grid.png``."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Units of work that are done, and in total."""


class NullTracker:
    """A tracker that drops everything."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Drop the metrics."""

    def artifact(self, name: str, data: bytes) -> None:
        """Drop the artifact."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Drop the progress."""


def publish(out: StageOutput, tracker: Tracker, name: str, data: bytes) -> FileEntry:
    """Write a file for people to look at to ``artifacts`` in the stage's folder, and send it to the tracker.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    entry = out.put(f"artifacts/{name}", data)
    tracker.artifact(name, data)
    return entry
