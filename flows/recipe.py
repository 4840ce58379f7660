"""A recipe: everything a pipeline needs to know, in one file."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from dit.encode import EncodeConfig
from dit.evaluate import EvaluateConfig
from dit.sample import SampleConfig
from dit.train import TrainConfig
from flows.contract import STAGES
from flows.launch import LocalLaunch
from flows.registry import RegisterConfig
from storage.archive import ArchiveRef
from storage.config import Config, operational
from storage.errors import InputError
from storage.manifest import Manifest, json_digest
from storage.shards import ShardConfig

RECIPES = Path(str(files("flows"))) / "recipes"
HERE = "${recipe_dir}"

AnyConfig = TypeVar("AnyConfig", bound=Config)


class Recipe(Config):
    """The archive, the config of every stage, and where training runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """What runs of this recipe are called."""
    archive: ArchiveRef
    """The images."""
    shard: ShardConfig = ShardConfig()
    """Images to tars."""
    encode: EncodeConfig
    """Tars to latents."""
    train: TrainConfig = TrainConfig()
    """Latents to a checkpoint."""
    launch: LocalLaunch = operational(LocalLaunch())
    """Where training runs."""
    sample: SampleConfig = SampleConfig()
    """A checkpoint to samples."""
    evaluate: EvaluateConfig
    """Samples to metrics."""
    registry: RegisterConfig = RegisterConfig()
    """A checkpoint to a model version."""

    @property
    def pipeline_id(self) -> str:
        """The same for the same recipe on the same archive, so that an interrupted pipeline goes on as itself."""
        return f"{self.name}-{json_digest(self.model_dump(mode='json'))[:8]}"

    def config_of(self, stage: str) -> Config:
        """The config of a stage by the stage's name."""
        config = getattr(self, {"register": "registry"}.get(stage, stage))
        assert isinstance(config, Config)
        return config

    def finished(self, root: str, before: str | None = None) -> list[Manifest] | None:
        """The manifests of all stages, or of those before one, if every one is done; else None."""
        source: ArchiveRef | Manifest = self.archive
        manifests: list[Manifest] = []
        for name, stage in STAGES.items():
            if name == before:
                break
            manifest = stage.output(root, self.config_of(name), source).committed(stage.kind)
            if manifest is None:
                return None
            manifests.append(manifest)
            source = manifest
        return manifests


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by the name of a preset or the path of a YAML file.

    Args:
        name: such as ``demo`` or ``my/recipe.yaml``. ``${recipe_dir}`` in it is the file's folder.
        overrides: ``train.steps=2000`` and the like; values are YAML.

    Raises:
        InputError: there is no such recipe, or something in it is wrong; the line says where.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        presets = ", ".join(sorted(preset.stem for preset in RECIPES.glob("*.yaml")))
        raise InputError(f"recipe {name!r}: neither a YAML file nor one of the presets ({presets})")
    values = _parse(path.read_text().replace(HERE, str(path.parent.resolve())), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of names to values")
    for override in overrides:
        _override(values, override)
    return validated(Recipe, values, str(path))


def validated(kind: type[AnyConfig], values: Any, where: str) -> AnyConfig:
    """Check values against a config.

    Raises:
        InputError: one line with the first thing that is wrong, and where.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = "no such key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{where}: {place}: {problem}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: write key=value, such as train.steps=2000")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override}: {parent} is a value, nothing lies below it")
    values[last] = _parse(text, f"--set {override}")
