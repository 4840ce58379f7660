"""A recipe: everything a pipeline needs to know, in one file."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from dit.average import AverageConfig
from dit.encode import EncodeConfig, held_out_config
from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from flows.contract import STAGES, Source, Stage
from flows.inventory import input_of
from flows.launch.spec import LaunchSpec, LocalLaunch
from flows.over_training import MilestonesConfig, OverTraining, best, model_of
from flows.over_widths import OverWidths, WidthsConfig
from flows.recipe_file import check_keys, parse_override, put, read_values, refusal
from flows.registry.config import RegisterConfig
from flows.tracking import references
from storage import uri
from storage.archives.open import ArchiveRef
from storage.config import Config, added, operational, problem
from storage.errors import InputError
from storage.manifest import Manifest, StageOutput, is_withdrawn, withdrawn
from storage.seal import json_digest
from storage.shards.shard import ShardConfig

AnyConfig = TypeVar("AnyConfig", bound=Config)


class Recipe(Config):
    """The archive, the config of every stage, and where the ranks run."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the recipe and of its pipeline runs."""
    archive: ArchiveRef
    """Where the training images and the held-out images lie."""
    shard: ShardConfig = ShardConfig()
    """Images to webdataset tars."""
    encode: EncodeConfig
    """Tars to a store of latents, or of pixels."""
    train: TrainConfig = TrainConfig()
    """Latents to a checkpoint."""
    launch: LaunchSpec = operational(LocalLaunch())
    """Where the ranks of encode, train, sample and evaluate run."""
    average: AverageConfig | None = added(None)
    """An average of the trained weights of any width, which is sampled, evaluated and registered in the place of the
    last step. Default: none."""
    sample: SampleConfig = SampleConfig()
    """A checkpoint to generated images."""
    evaluate: EvaluateConfig | None = None
    """Generated images to metrics. Default: none, and the model is registered without metrics."""
    evaluate_milestones: MilestonesConfig | None = added(None)
    """Evaluation of the milestones of training, and of its last step. Default: none."""
    evaluate_widths: WidthsConfig | None = added(None)
    """Evaluation of averages of several widths, made from those of ``train.ema_power``. Default: none."""
    registry: RegisterConfig = RegisterConfig()
    """A checkpoint to a version in the model registry."""

    @model_validator(mode="after")
    def _has_held_out_images(self) -> Self:
        if self.train.held_out is not None and self.archive.held_out is None:
            raise ValueError("train.held_out: needs held-out images; name them in archive.held_out")
        return self

    @model_validator(mode="after")
    def _models_can_be_evaluated(self) -> Self:
        _ = self.over_widths  # which raises
        if self.over_training is None and self.registry.checkpoint == "best":
            raise ValueError("registry.checkpoint: best needs evaluate_milestones")
        if self.average is not None and self.registry.checkpoint == "best":
            raise ValueError("average: takes the place of the best milestone; set registry.checkpoint: last")
        return self

    @property
    def over_training(self) -> OverTraining | None:
        """The evaluation of the milestones; None if the recipe asks for none."""
        asked = self.evaluate_milestones
        return None if asked is None else OverTraining.of(asked, self.train, self.sample, self.evaluate)

    @property
    def over_widths(self) -> OverWidths | None:
        """The evaluation of averages of several widths; None if the recipe asks for none."""
        asked = self.evaluate_widths
        return None if asked is None else OverWidths.of(asked, self.train, self.sample, self.evaluate)

    def asked_over_training(self) -> OverTraining:
        """The evaluation of the milestones.

        Raises:
            InputError: the recipe asks for none.
        """
        if self.over_training is None:
            raise InputError(f"milestones: recipe {self.name} evaluates none; set evaluate_milestones.sample.count")
        return self.over_training

    @property
    def pipeline_id(self) -> str:
        """Name and digest, such as ``demo-1a2b3c4d``, by which an interrupted pipeline finds its MLflow run again.

        It is the same for the same values, also after an upgrade that has added fields.
        """
        return f"{self.name}-{json_digest(self.stable_values())[:8]}"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this recipe: those that have a config, and whose input another one of them makes."""
        names: list[str] = []
        for name, stage in STAGES.items():
            read = (None, *names)
            if getattr(self, _field(name)) is not None and (stage.reads in read or stage.instead in names):
                names.append(name)
        return tuple(names)

    def reads(self, stage: str) -> str | None:
        """The stage whose output a stage of this recipe reads; None if that is the archive."""
        made = STAGES[stage]
        return made.instead if made.instead and made.reads not in self.stages else made.reads

    def config_of(self, stage: str) -> Config:
        """The config of a stage.

        Raises:
            InputError: the recipe does not have the stage.
        """
        if stage not in self.stages:
            chain = [stage]
            while (before := STAGES[chain[0]].reads) is not None:
                chain.insert(0, before)
            missing = next(name for name in chain if name not in self.stages)
            required = [name for name, field in STAGES[missing].config.model_fields.items() if field.is_required()]
            keys = ", ".join(f"{_field(missing)}.{name}" for name in required) or _field(missing)
            raise InputError(f"{stage}: recipe {self.name} has no {missing}; set {keys} to go on")
        config = getattr(self, _field(stage))
        assert isinstance(config, Config)
        return config

    def form(self, stage: str, config: Config | None = None) -> dict[str, Config]:
        """The arguments of a stage's flow: the config, and launcher and archive if the stage takes them.

        Args:
            stage: its name.
            config: replaces the recipe's config of the stage.

        Raises:
            InputError: there is no other config, and the recipe does not have the stage.
        """
        launcher = {"launcher": self.launch} if STAGES[stage].ranked else {}
        archive = {} if STAGES[stage].reads else {STAGES[stage].role: self.archive}
        return {"config": self.config_of(stage) if config is None else config, **launcher, **archive}

    def finished(self, root: str, before: str | None = None) -> list[Manifest] | None:
        """The manifests of all stages, or of those before one; None if any of them is not done.

        With all stages, the milestones and the averages of several widths must be evaluated too.

        Args:
            root: folder or URL of all outputs.
            before: name of the stage. Default: none, for all stages.

        Raises:
            InputError: the archive or weights are missing, or an output is damaged.
        """
        names = list(takewhile(lambda name: name != before, self.stages))
        everything = [manifest for _, manifest in self.outputs(root, names) if manifest is not None]
        if len(everything) < len(names):
            return None
        further = (self.evaluations(root, everything), self.widths(root, everything)) if before is None else ()
        return None if any(None in each.values() for each in further) else everything

    def unfinished(self, root: str) -> str:
        """What to say of a recipe whose stages are not all done: that one was withdrawn, or to run it."""
        last = [output.uri for output, manifest in self.outputs(root, self.stages) if manifest is None]
        gone = [f"{uri.redact(folder)} {withdrawn(folder)}" for folder in last if is_withdrawn(folder)]
        return gone[0] if gone else "run the recipe first"

    def outputs(self, root: str, names: Sequence[str]) -> Iterator[tuple[StageOutput, Manifest | None]]:
        """The outputs of some stages in turn, with their manifests, up to the first that is not done."""
        made: dict[str, Manifest] = {}
        for name in names:
            stage, source = STAGES[name], self.source(STAGES[name], made, root)
            if source is None:
                return
            output = stage.output(root, references.located(self.config_of(name), root), source)
            manifest = output.committed(stage.kind)
            yield output, manifest
            if manifest is None:
                return
            made[name] = manifest

    def evaluations(self, root: str, made: Sequence[Manifest]) -> dict[int, MetricsManifest | None]:
        """The metrics over training by step, None for a step that is not evaluated; empty if the recipe asks for none.

        Args:
            root: folder or URL of all outputs.
            made: manifests of the recipe's stages, at least up to the latents.
        """
        latents = next(manifest for manifest in made if manifest.stage == STAGES["train"].reads)
        return self.over_training.evaluations(root, latents) if self.over_training else {}

    def widths(self, root: str, made: Sequence[Manifest]) -> dict[float, MetricsManifest | None]:
        """The metrics of averages by width, None for one that is not evaluated; empty if the recipe asks for none.

        Args:
            root: folder or URL of all outputs.
            made: manifests of the recipe's stages, at least up to the training.
        """
        trained = next(manifest for manifest in made if manifest.stage == "train")
        return self.over_widths.evaluations(root, trained) if self.over_widths else {}

    def further(self, root: str, made: Sequence[Manifest]) -> list[MetricsManifest]:
        """The evaluations of milestones and of averages of several widths that are done. Arguments as `widths`."""
        found = (*self.evaluations(root, made).values(), *self.widths(root, made).values())
        return [each for each in found if each is not None]

    def chosen(self, trained: Manifest, evaluations: Mapping[int, MetricsManifest]) -> Manifest:
        """The model to sample, evaluate and register: that of the last step, or the best one over training."""
        if self.registry.checkpoint == "last":
            return trained
        return model_of(evaluations[best(evaluations, self.registry.rule)])

    def source(self, stage: Stage, made: Mapping[str, Manifest], root: str) -> "Source | None":
        """What a stage reads, of the manifests before it; None if milestones to choose from are not evaluated yet."""
        if stage.reads is None:
            return self.archive
        if stage.reads == "train" and stage.name != "average" and "average" in made:
            return made["average"]
        if stage.reads == "train" and self.registry.checkpoint == "best":
            found = self.evaluations(root, list(made.values()))
            known = {step: metrics for step, metrics in found.items() if metrics is not None}
            whole = self.train.steps in known and len(known) == len(found)
            return self.chosen(made["train"], known) if whole else None
        return made[str(self.reads(stage.name))]

    def encoding_held_out(self, latents: Manifest, root: str, *, force: bool) -> Self | None:
        """This recipe with the held-out images to encode, if training is still to measure its loss on them.

        Args:
            latents: manifest of the latents to train on, or an estimate of it.
            root: folder or URL of all outputs.
            force: whether training runs again if it is done.
        """
        train = STAGES["train"]
        if self.train.held_out is None:
            return None
        config = references.located(self.train, root)
        if not force and train.output(root, config, latents).committed(train.kind) is not None:
            return None
        return self.model_copy(update={"encode": held_out_config(self.encode)})

    def held_out(self, made: Sequence[Manifest], root: str) -> Manifest | None:
        """The latents of the held-out images on which training measures its loss; None if there are none.

        Args:
            made: manifests of the recipe's stages, at least of the shards.
            root: folder or URL of all outputs.
        """
        if self.train.held_out is None:
            return None
        encode = STAGES["encode"]
        shards = next(manifest for manifest in made if manifest.stage == encode.reads)
        return encode.output(root, held_out_config(self.encode), shards).committed(encode.kind)

    def source_of(self, stage: str, given: str | None, root: str) -> ArchiveRef | str:
        """The input of a stage: what `input_of` finds for a reference, or the recipe's own earlier output.

        Raises:
            InputError: there is none, it is not what the stage reads, or the recipe does not go that far.
        """
        self.config_of(stage)
        if STAGES[stage].reads is None:
            return self.archive
        if given is None:
            before = self.finished(root, before=stage)
            made = {manifest.stage: manifest for manifest in before or ()}
            source = self.source(STAGES[stage], made, root) if before else None
            if source is None:
                why = self.unfinished(root)
                raise InputError(f"{stage}: the stages before it are not done; {why}, or give --from")
            assert isinstance(source, Manifest)
            return source.url
        url = input_of(STAGES[stage], given, root)
        STAGES[stage].source(url)
        return url


def _field(stage: str) -> str:
    """The field that holds a stage's config."""
    return "registry" if stage == "register" else stage


def load_recipe(name: str, overrides: Sequence[str] = (), root: str = "runs") -> Recipe:
    """Read a recipe by the name of a preset or the path of a YAML file.

    Args:
        name: such as ``demo`` or ``my/recipe.yaml``. In its strings ``${recipe_dir}`` is the file's
            folder and ``${home}`` the local folder of the root.
        overrides: ``train.steps=2000`` and the like; values are YAML.
        root: fsspec URL of the folder that holds every output.

    Raises:
        InputError: there is no such recipe, or something in it is wrong; the line says where.

    Examples:
        >>> recipe = load_recipe("demo", ["train.steps=300"])
        >>> recipe.train.steps, recipe.sample.guidance_scale
        (300, 2.0)
        >>> recipe.stages
        ('shard', 'encode', 'train', 'sample', 'evaluate', 'register')
        >>> recipe.changed(name="guided", sample=recipe.sample.changed(guidance_scale=3)).name
        'guided'
    """
    values, where = read_values(name, root)
    if "base" in values:
        raise InputError(f"{where}: a sweep of several recipes; run it whole with `ditflow run`, or name its base")
    return recipe_of(values, where, overrides)


def recipe_of(values: dict[str, Any], where: str, overrides: Sequence[str]) -> Recipe:
    """The recipe with these values, which the overrides change in place.

    Raises:
        InputError: something is wrong; the line says where.
    """
    for override in overrides:
        put(values, *parse_override(override))
    check_keys(values, where)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise refusal(problem(error, values), where, overrides) from error


def config_alone(kind: type[AnyConfig], stage: str, defaults: dict[str, Any], overrides: Sequence[str]) -> AnyConfig:
    """A stage's config where there is no recipe.

    Args:
        kind: of the config.
        stage: what overrides begin with.
        defaults: values of its own, changed in place.
        overrides: as for `load_recipe`, of this stage alone.

    Raises:
        InputError: an override is wrong; the line says where.
    """
    values: dict[str, Any] = {stage: defaults}
    for override in overrides:
        put(values, *parse_override(override))
    others = sorted(values.keys() - {stage})
    if others:
        raise InputError(f"--set {others[0]}: without a recipe there is only {stage}")
    try:
        return kind.model_validate(values[stage])
    except ValidationError as error:
        wrong = problem(error, values[stage])
        raise InputError(f"--set {'.'.join(filter(None, (stage, wrong.place)))}: {wrong.message}") from error
