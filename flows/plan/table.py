"""A plan as it is printed: the stages of a recipe, what they need, and what does not fit."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """A stage in the plan."""

    stage: str
    state: str
    """``done``, ``to do``, or how many of its units are there."""
    images: int
    objects: int
    size: int
    """Bytes that it leaves behind."""
    missing: int
    """Bytes of them that are still to be written."""
    hours: float
    """For the work that is left."""


@dataclass(frozen=True)
class Copy:
    """The latents of a root that lies elsewhere, which training copies to this machine first."""

    folder: str
    """Of the cache."""
    size: int
    """Bytes to be copied yet."""
    there: int
    """Bytes that are free where the cache lies."""


@dataclass(frozen=True)
class Plan:
    """A recipe's stages and what they need of the machine."""

    recipe: str
    lines: tuple[Line, ...]
    rates: dict[str, float]
    """What the machine does in a second, by which the hours are reckoned."""
    memory: int
    """Bytes that training holds on each rank: weights, gradients, optimizer, average, activations."""
    memory_there: int
    """Bytes that a GPU has, or without one this machine, for all its ranks."""
    disk: int
    """Bytes to be written yet."""
    disk_there: int | None
    """Bytes that are free where the root lies; None where it is unknown."""
    copy: Copy | None
    """None where latents are read where they lie, or streamed, or the model is there."""
    problems: tuple[str, ...]
    """Why it cannot run as it is, and what to change."""

    def as_json(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """For people: a head, a row for each stage, and the sum of the hours."""
        rows: list[tuple[str, ...]] = [("stage", "state", "images", "objects", "GB", "hours")]
        for line in self.lines:
            numbers = (f"{line.images:,}", f"{line.objects:,}", f"{line.size / 1e9:,.2f}", f"{line.hours:,.2f}")
            rows.append((line.stage, line.state, *numbers))
        rows.append(("all", "", "", "", "", f"{sum(line.hours for line in self.lines):,.2f}"))
        return rows

    def needs(self) -> list[str]:
        """For people: a line each for disk, cache and memory."""
        there = "free space unknown" if self.disk_there is None else f"{self.disk_there / 1e9:,.1f} GB free"
        copy = self.copy and f"{self.copy.size / 1e9:,.2f} GB of latents to copy to {self.copy.folder}, "
        memory = f"{self.memory / 2**30:,.1f} GiB a rank, {self.memory_there / 2**30:,.1f} GiB available"
        return [
            f"disk    {self.disk / 1e9:,.2f} GB to write, {there}",
            *([f"cache   {copy}{self.copy.there / 1e9:,.1f} GB free"] if self.copy else []),
            f"memory  {memory}, for training",
        ]
