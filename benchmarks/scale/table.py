"""What was measured of a stage or a command, as a table; and how time grows with the number of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flows.command.tables import aligned

_GROWING = ("shard", "encode", "evaluate", "plan", "run")
"""Lines whose time depends on the number of images."""
_HEAD = ("", "images", "s", "planned", "CPU-s", "images/s", "MiB", "objects", "planned", "MB", "planned", "manifest kB")


@dataclass(frozen=True)
class Line:
    """A stage, or a command, as it was measured and as it was planned."""

    name: str
    images: int
    """Images that it works on; those of an evaluation are passed through the extractor."""
    seconds: float
    processor: float
    """Seconds of processor time of all processes."""
    peaks: dict[str, int]
    """Largest memory of a process in bytes, by its kind."""
    objects: int = 0
    size: int = 0
    """Bytes of all objects."""
    manifest: int = 0
    """Bytes of the manifest."""
    planned_seconds: float | None = None
    planned_objects: int | None = None
    planned_size: int | None = None

    @property
    def peak(self) -> int:
        """Largest memory of any process, bytes."""
        return max(self.peaks.values(), default=0)


def table(lines: Sequence[Line]) -> str:
    """The lines under a head, and below them the memory of each kind of process."""
    rows = [_HEAD, *map(_row, lines)]
    peaks = [("MiB", *(f"{kind} {peak / 2**20:,.0f}" for kind, peak in sorted(line.peaks.items()))) for line in lines]
    memory = [f"{line.name}: {', '.join(row[1:])}" for line, row in zip(lines, peaks, strict=True) if line.peaks]
    return "\n".join([*aligned(rows, numbers=range(1, len(_HEAD))), "", "MiB of each process", *memory, ""])


def growth(found: Mapping[int, Sequence[Line]]) -> dict[str, float]:
    """Time for an image at the largest number, relative to that at the smallest: 1 if time is linear."""
    few, many = ({line.name: line for line in found[count]} for count in (min(found), max(found)))
    ratios = {}
    for name in _GROWING if len(found) > 1 else ():
        more = many[name].images / few[name].images
        ratios[f"{name}_growth"] = many[name].seconds / few[name].seconds / more
        ratios[f"{name}_growth_processor"] = many[name].processor / few[name].processor / more
    return ratios


def _row(line: Line) -> tuple[str, ...]:
    rate = f"{line.images / line.seconds:,.0f}"
    planned = [line.planned_seconds, line.planned_objects, line.planned_size and line.planned_size / 1e6]
    seconds, objects, size = ("" if value is None else f"{value:,.0f}" for value in planned)
    return (
        line.name,
        f"{line.images:,}",
        f"{line.seconds:,.1f}",
        seconds,
        f"{line.processor:,.1f}",
        rate,
        f"{line.peak / 2**20:,.0f}",
        f"{line.objects:,}",
        objects,
        f"{line.size / 1e6:,.1f}",
        size,
        f"{line.manifest / 1e3:,.1f}",
    )
