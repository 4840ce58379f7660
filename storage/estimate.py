"""What a stage will cost, as the stage itself reckons before it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from storage import records, uri
from storage.manifest import AnyManifest, Manifest, StageOutput

if TYPE_CHECKING:
    from storage.rows.store import RowLayout


@dataclass(frozen=True)
class StageCost:
    """What a stage has to do and what it leaves behind."""

    images: int
    objects: int
    """Objects written, commit records and manifest among them."""
    size: int
    """Bytes that they have."""
    units: int
    """Units that commit themselves."""
    done: int
    """How many of them are there."""
    seconds: float
    """For all units, on the machine of the rates."""
    leaves: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the stage's manifest, as far as the next stages' estimates read them."""
    unit: str = "units"
    """What people call a unit."""
    memory: int = 0
    """Bytes that each rank holds; 0 where that is of no weight."""
    copied: int | None = None
    """Bytes to copy to this machine's cache yet; None where the stage copies nothing."""
    save_disk: str = ""
    """What to change in the config for a smaller size."""
    save_memory: str = ""
    """What to change in the config for less memory."""
    problems: tuple[str, ...] = ()
    """What else will stop the stage."""


@dataclass(frozen=True)
class PlanContext:
    """What an estimate may ask for besides the stage's config and source."""

    out: StageOutput
    """The stage's folder, with what earlier starts have left there."""
    rates: dict[str, float]
    """What the machine does in a second, by name; what is not given is measured and added."""
    world_size: int
    """Ranks that share the work."""
    nodes: int
    """Machines that they run on."""
    before: Mapping[str, Manifest]
    """Manifests of the stages before by their names, as they are or, without files, as they will be."""

    def rate(self, name: str, measure: Callable[[], float]) -> float:
        """A rate, measured if it is not known."""
        if name not in self.rates:
            self.rates[name] = measure()
        return self.rates[name]

    def manifest(self, kind: type[AnyManifest]) -> AnyManifest:
        """The manifest of a stage before."""
        found = self.before[kind.STAGE]
        assert isinstance(found, kind)
        return found

    def records(self) -> int:
        """Units of this stage that have left a commit record."""
        return sum(name.endswith(".json") for name in uri.names(self.out.url(records.FOLDER)))


def store_objects(layout: "RowLayout") -> int:
    """Objects that a stage writes to fill a row store: also records, metadata, a picture and the manifest."""
    return layout.objects + layout.blocks + len(layout.arrays) + 3
