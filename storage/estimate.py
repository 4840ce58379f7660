"""What a stage will cost, estimated by the stage itself before it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from storage import records, uri
from storage.manifest import AnyManifest, Manifest, StageOutput

if TYPE_CHECKING:
    from storage.rows.store import RowLayout


@dataclass(frozen=True)
class StageCost:
    """The work of a stage and the size of its output."""

    images: int
    """Images that the stage processes."""
    objects: int
    """Objects that the stage writes, including commit records and the manifest."""
    size: int
    """Bytes of all objects."""
    units: int
    """Units of work, each with a commit record of its own."""
    done: int
    """Units that are committed already."""
    seconds: float
    """Seconds for all units, on the machine that the rates are of."""
    leaves: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the stage's future manifest that the estimates of the next stages read."""
    unit: str = "units"
    """Name of a unit, for people."""
    memory: int = 0
    """Bytes that each rank needs in memory; 0 if that is little."""
    copied: int | None = None
    """Bytes that are still to be copied to this machine's cache; None if the stage copies nothing."""
    save_disk: str = ""
    """What to change in the config for a smaller output."""
    save_memory: str = ""
    """What to change in the config for less memory."""
    guess: str = ""
    """What the estimate takes for granted and the run decides, for people."""


@dataclass(frozen=True)
class PlanContext:
    """What an estimate needs besides the stage's config and source."""

    out: StageOutput
    """The stage's output, with the units that earlier runs have committed."""
    rates: dict[str, float]
    """Rates of a machine by name, work a second; a rate that is missing is measured and added."""
    world_size: int
    """Ranks that share the work."""
    nodes: int
    """Machines that the ranks run on."""
    before: Mapping[str, Manifest]
    """Manifests of the previous stages by name. The manifest of an unfinished stage is an estimate, without files."""

    def rate(self, name: str, measure: Callable[[], float]) -> float:
        """A rate by name, measured if it is not known."""
        if name not in self.rates:
            self.rates[name] = measure()
        return self.rates[name]

    def manifest(self, kind: type[AnyManifest]) -> AnyManifest:
        """The manifest of a previous stage."""
        manifest = self.before[kind.STAGE]
        assert isinstance(manifest, kind)
        return manifest

    def records(self) -> int:
        """Commit records of this stage."""
        return sum(name.endswith(".json") for name in uri.names(self.out.url(records.FOLDER)))


def store_objects(layout: "RowLayout") -> int:
    """Objects that a stage writes for a row store, including records, metadata, one artifact and the manifest."""
    return layout.objects + layout.blocks + len(layout.arrays) + 3
