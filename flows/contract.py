"""The table of stages: what each one reads, writes and runs.

Flows, command, worker and plan derive from it. It names the modules of the stages, which are imported when first used.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from storage.config import Config
from storage.manifest import Manifest, StageOutput, stage_output
from storage.stage import Run, StageDefinition

if TYPE_CHECKING:
    from storage.archives.open import ArchiveRef

Source: TypeAlias = "ArchiveRef | Manifest"


SOURCE = (
    "a recipe's name or `latest`, for the newest output of the stage before; digits of a digest; "
    "a registered model, models:/name@alias; an MLflow run id; a manifest or its folder"
)
"""What names the input of a stage; `flows.inventory.input_of` finds it."""


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Args:
        name: the stage's folder, its command, its flow.
        module: holds its `StageDefinition`, called ``DEFINITION``.
        reads: the stage whose manifest it reads; None for the stage that reads an archive.
        role: its name for that input.
        help: what it does, in a few words.
        ranked: whether its work can be shared among ranks.
        instead: the stage whose manifest it reads where a recipe lacks the one that it ``reads``.

    Examples:
        >>> STAGES["sample"].config.__name__, STAGES["sample"].reads
        ('SampleConfig', 'train')
    """

    name: str
    module: str
    reads: str | None
    role: str
    help: str
    ranked: bool = False
    instead: str | None = None

    @property
    def definition(self) -> StageDefinition[Any, Any, Any]:
        """The ``DEFINITION`` of the stage's module."""
        definition: StageDefinition[Any, Any, Any] = import_module(self.module).DEFINITION
        return definition

    @property
    def config(self) -> type[Config]:
        """Class of its config."""
        return self.definition.config

    @property
    def kind(self) -> type[Manifest]:
        """Class of the manifest that it writes."""
        return self.definition.manifest

    @property
    def run(self) -> Run[Any, Any, Manifest]:
        """The function that does the missing work and commits the manifest."""
        return self.definition.run

    def source(self, given: "ArchiveRef | str") -> Source:
        """Read the manifest that the stage starts from; an archive is returned as it is.

        Raises:
            InputError: there is no manifest, or it is another stage's.
        """
        if self.reads is None:
            assert not isinstance(given, str)
            return given
        assert isinstance(given, str)
        other = self.instead is not None and Manifest.read(given).stage == self.instead
        return STAGES[self.instead if other and self.instead else self.reads].kind.read(given)

    def output(self, root: str, config: Config, source: Source, *, force: bool = False) -> StageOutput:
        """Name the output of the stage for a config and a source, whether it exists or not.

        Args:
            root: folder or URL of all outputs.
            config: of the stage.
            source: what the stage reads: the archive, or the manifest of the stage before.
            force: name a new output beside a finished one.

        Raises:
            InputError: the archive, or a file that enters the digest such as weights, is missing or damaged.
        """
        other = isinstance(source, Manifest) and source.stage == self.instead
        role = STAGES[self.reads].role if other and self.reads else self.role
        return stage_output(
            root,
            self.name,
            self.definition.version,
            config,
            parents=({role: source} if isinstance(source, Manifest) else {}) | self.definition.parents(config, source),
            inputs=self.definition.inputs(config, source),
            force=force,
        )


@dataclass(frozen=True)
class Outcome:
    """The result of one stage."""

    name: str
    """Of the stage; or `ENCODE_HELD_OUT`."""
    state: Literal["ran", "skipped"]
    """``skipped``: its output was there."""
    seconds: float
    """That it took, the time to start its ranks included."""
    manifest: str
    """URL of its manifest."""
    step: int | None = None
    """The training step, if the stage evaluates a milestone."""
    std: float | None = None
    """The relative width, if the stage makes or evaluates one of several averages."""

    @property
    def own(self) -> bool:
        """Whether it is one of the recipe's stages, and not of the evaluation of another model."""
        return self.step is None and self.std is None

    @property
    def output(self) -> Manifest:
        """Its manifest as an object of the stage's class: counts, metrics, files, parents.

        Raises:
            InputError: it is gone.
        """
        stage = "encode" if self.name == ENCODE_HELD_OUT else self.name
        return STAGES[stage].kind.read(self.manifest)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("shard", "storage.shards.shard", None, "archive", "images to webdataset tars"),
        Stage("encode", "dit.encode", "shard", "shards", "tars to a store of latents", ranked=True),
        Stage("train", "dit.train", "encode", "latents", "latents to a checkpoint", ranked=True),
        Stage("average", "dit.average", "train", "checkpoint", "a training run to an average of any width"),
        Stage("sample", "dit.sample", "train", "checkpoint", "a checkpoint to images", ranked=True),
        Stage("evaluate", "dit.evaluate", "sample", "samples", "images to metrics", ranked=True),
        Stage(
            "register",
            "flows.registry.register",
            "evaluate",
            "metrics",
            "a checkpoint to a model version",
            instead="sample",
        ),
    )
}
"""In the order of the pipeline."""
ENCODE_HELD_OUT = "encode held_out"
"""Name of a second encoding in lists of stages: of the images on which training measures its loss."""
