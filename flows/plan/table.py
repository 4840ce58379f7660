"""A plan as it is printed: the cost of each stage, what all need of the machine, and what does not fit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """A stage in the plan."""

    stage: str
    state: str
    """``done``, ``to do``, or the number of its units that are done."""
    images: int
    objects: int
    size: int
    """Bytes of the output."""
    missing: int
    """Bytes of the output that are not written yet."""
    hours: float
    """Hours for the work that is left."""
    device_hours: float
    """The hours of all ranks that share it."""


@dataclass(frozen=True)
class Copy:
    """The copy of remote latents that training makes in this machine's cache."""

    folder: str
    """Folder of the cache."""
    size: int
    """Bytes that are not copied yet."""
    there: int | None
    """Free bytes on the disk of the cache."""


@dataclass(frozen=True)
class Plan:
    """A recipe's stages and what they need of the machine."""

    recipe: str
    lines: tuple[Line, ...]
    rates: dict[str, float]
    """Speeds of the machine per second, from which the hours are computed."""
    price: float | None
    """Of a device-hour; None if it is not given."""
    memory: int
    """Bytes on each rank in training: weights, gradients, optimizer state, EMA, activations."""
    memory_there: int
    """Bytes of a GPU, or without one of this machine, for all its ranks."""
    disk: int
    """Bytes that are not written yet."""
    disk_there: int | None
    """Free bytes on the disk of the root; None if the root is remote."""
    copy: Copy | None
    """None if the latents are local or streamed, or the model is trained already."""
    archive: tuple[tuple[str, str], ...]
    """What the recipe's archive holds, as `storage.shards.summary` yields it."""
    guesses: tuple[str, ...]
    """What the hours take for granted."""
    problems: tuple[str, ...]
    """Why the recipe cannot run as it is, and what to change."""

    @property
    def money(self) -> float | None:
        """What the hours cost; None without a price."""
        return None if self.price is None else self.price * sum(line.device_hours for line in self.lines)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self) | {"money": self.money}

    def rows(self) -> list[tuple[str, ...]]:
        """Table rows: a header, one row for each stage, and the sum of the hours and of the money."""
        rows: list[tuple[str, ...]] = [("stage", "state", "images", "objects", "GB", "hours", *self._priced())]
        for line in self.lines:
            numbers = (f"{line.images:,}", f"{line.objects:,}", f"{line.size / 1e9:,.2f}", f"{line.hours:,.2f}")
            rows.append((line.stage, line.state, *numbers, *self._priced([line])))
        hours = f"{sum(line.hours for line in self.lines):,.2f}"
        rows.append(("all", "", "", "", "", hours, *self._priced(self.lines)))
        return rows

    def _priced(self, lines: Sequence[Line] | None = None) -> tuple[str, ...]:
        """The cells of device-hours and money, of the header without lines; none without a price."""
        if self.price is None:
            return ()
        if lines is None:
            return ("device-hours", f"at {self.price:g}")
        hours = sum(line.device_hours for line in lines)
        return (f"{hours:,.2f}", f"{hours * self.price:,.2f}")

    def needs(self) -> list[str]:
        """One line each for disk, cache, memory and what is guessed."""
        there = _free(self.disk_there)
        copy = self.copy and f"{self.copy.size / 1e9:,.2f} GB of latents to copy to {self.copy.folder}, "
        need, available = f"{self.memory / 2**30:,.1f} GiB", f"{self.memory_there / 2**30:,.1f} GiB"
        return [
            f"disk    {self.disk / 1e9:,.2f} GB to write, {there}",
            *([f"cache   {copy}{_free(self.copy.there)}"] if self.copy else []),
            f"memory  {need} on each rank in training, {available} available",
            *(f"hours   {guess}" for guess in self.guesses),
        ]


def _free(there: int | None) -> str:
    return "free space unknown" if there is None else f"{there / 1e9:,.1f} GB free"
