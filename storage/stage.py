"""The definition of a stage. Each stage's module has one `StageDefinition`, named ``DEFINITION``."""

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
    """The function that does a stage's work."""

    def __call__(self, config: ConfigIn, source: SourceIn, /, *, out: StageOutput, tracker: Tracker) -> MadeOut:
        """Do the units that are not committed yet, then commit the manifest.

        Args:
            config: the stage's config.
            source: the archive, or the manifest of the stage before.
            out: the output to write and commit.
            tracker: receives metrics, artifacts and progress.
        """


def no_check(_: Any, __: Any, ___: PlanContext) -> None:
    """Nothing to check."""


def no_inputs(_: Any, __: Any) -> dict[str, str]:
    """No inputs besides config and source."""
    return {}


def no_parents(_: Any, __: Any) -> dict[str, Manifest]:
    """No outputs besides the source."""
    return {}


@dataclass(frozen=True)
class StageDefinition(Generic[ConfigT, SourceT, MadeT]):
    """A stage.

    Args:
        config: its type of config.
        manifest: its type of manifest, whose ``STAGE`` is the stage's name.
        version: raised when the same config and inputs give other bytes than before.
        run: does the work.
        inputs: digests by name of all inputs besides config, source and ``parents``, such as weights.
        estimate: estimates the cost; None for a stage that costs too little to be planned.
        rates: the rates that the estimate asks for, by name, each with a description and its unit.
        check: raises an `InputError` for what would stop the stage, known before its source exists: the source and
            the manifests before it may be estimates. What it calls, ``run`` calls too. Runs on the CPU.
        parents: manifests by name of further outputs that the config names.

    Examples:
        >>> from storage.manifest import stage_output
        >>> from storage.tracker import NullTracker
        >>> class Stamp(Config):
        ...     text: str
        >>> class Stamped(Manifest):
        ...     STAGE = "stamp"
        >>> def run(config, source, *, out, tracker):
        ...     return out.commit(Stamped, [out.put("stamp.txt", f"{config.text} {source}".encode())])
        >>> definition, config = StageDefinition(Stamp, Stamped, 1, run), Stamp(text="seen:")
        >>> out = stage_output("memory://stamps", "stamp", 1, config, parents={}, inputs={"word": "0a1b"})
        >>> out.uri
        'memory://stamps/stamp/2d36f7a25b4caf83'
        >>> done = out.committed(Stamped) or definition.run(config, "word", out=out, tracker=NullTracker())
        >>> out.committed(Stamped).read_object("stamp.txt")  # done: whoever comes later reads it
        b'seen: word'
    """

    config: type[ConfigT]
    manifest: type[MadeT]
    version: int
    run: Run[ConfigT, SourceT, MadeT]
    inputs: Callable[[ConfigT, SourceT], dict[str, str]] = no_inputs
    estimate: Callable[[ConfigT, SourceT, PlanContext], StageCost] | None = None
    rates: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[ConfigT, SourceT, PlanContext], None] = no_check
    parents: Callable[[ConfigT, SourceT], dict[str, Manifest]] = no_parents
