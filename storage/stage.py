"""What a stage tells of itself. Each stage's module holds one `StageDefinition`, called ``DEFINITION``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from storage.config import Config
from storage.estimate import PlanContext, StageCost
from storage.manifest import Manifest, StageOutput
from storage.tracker import Tracker

ConfigT = TypeVar("ConfigT", bound=Config)
SourceT = TypeVar("SourceT")
MadeT = TypeVar("MadeT", bound=Manifest)
ConfigIn = TypeVar("ConfigIn", bound=Config, contravariant=True)
SourceIn = TypeVar("SourceIn", contravariant=True)
MadeOut = TypeVar("MadeOut", bound=Manifest, covariant=True)


class Run(Protocol[ConfigIn, SourceIn, MadeOut]):
    """Does the work that is not done yet and commits the manifest."""

    def __call__(self, config: ConfigIn, source: SourceIn, /, *, out: StageOutput, tracker: Tracker) -> MadeOut:
        """Bring the output to its manifest.

        Args:
            config: of the stage.
            source: what the stage starts from.
            out: the folder to write into and to commit.
            tracker: who listens.
        """


def no_inputs(_: Any, __: Any) -> dict[str, str]:
    """Nothing but config and source decides the stage's bytes."""
    return {}


@dataclass(frozen=True)
class StageDefinition(Generic[ConfigT, SourceT, MadeT]):
    """A stage, told by the module that does its work.

    Args:
        config: its config.
        manifest: the manifest that it writes; its ``STAGE`` is the stage's name.
        version: raised when the same config and inputs make other bytes than before.
        run: does the work.
        inputs: digests, by name, of what decides the bytes besides config and source.
        estimate: reckons what the stage costs; None for a stage that costs too little to be planned.
        rates: what a machine does in a second, as the estimate asks for it, by name and each with its unit.
    """

    config: type[ConfigT]
    manifest: type[MadeT]
    version: int
    run: Run[ConfigT, SourceT, MadeT]
    inputs: Callable[[ConfigT, SourceT], dict[str, str]] = no_inputs
    estimate: Callable[[ConfigT, SourceT, PlanContext], StageCost] | None = None
    rates: Mapping[str, str] = field(default_factory=dict)
