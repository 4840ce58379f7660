"""From a model of eight digits to the other two, by the recipes of the demo."""

import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from faults import MlflowServer

from dit.export import CheckpointManifest
from dit.training.origin import NAME
from flows.command.main import main
from flows.demo.digits import write_digits
from flows.recipe import load_recipe
from storage.archives.open import open_splits
from storage.manifest import Manifest

LESS = {"sample.count": 240, "sample.sampler": "dpm++", "sample.steps": 10}
ADAPTERS = ("train.lora={rank: 8}", "train.freeze=['!y_embedder.*']")


def test_the_recipes_share_the_digits_and_the_model(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits")
    base, other = (load_recipe(name, root=str(tmp_path)) for name in ("digits-0-7", "finetune-digits"))
    counts = dict[str, int]()
    for recipe, classes in ((base, "01234567"), (other, "89")):
        splits = open_splits(recipe.archive)
        assert [split.class_names for split in splits.values()] == [tuple(classes)] * 2
        counts |= {f"{recipe.name} {name}": len(split.members) for name, split in splits.items()}
    assert sum(counts.values()) == 1797
    assert other.train.model == base.train.model
    assert other.encode == base.encode
    assert other.train.init is not None
    assert other.train.init.source == f"models:/{base.registry.model_name}@champion"
    assert base.registry.promote == "automatic"  # so the first version is champion


def ran(recipe: str, root: Path, *sets: str) -> list[Manifest]:
    values = [*(f"{key}={value}" for key, value in LESS.items()), *sets]
    arguments = ["--root", str(root), "--json", *(part for value in values for part in ("--set", value))]
    with redirect_stdout(io.StringIO()) as said:
        assert main(["demo", "--recipe", recipe, *arguments]) == 0
    return [Manifest.read(stage["manifest"]) for stage in json.loads(said.getvalue())["stages"]]


def recognised(metrics: dict[str, float]) -> tuple[float, float]:
    """Wilson's interval of the share, 95 %."""
    share, count, z = metrics["recognised"], LESS["sample.count"], 1.96
    middle = share + z * z / 2 / count
    half = z * math.sqrt(share * (1 - share) / count + (z / 2 / count) ** 2)
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


@pytest.mark.full
def test_fine_tuning_is_ahead_of_training_from_scratch(
    tmp_path: Path, prefect_api: str, mlflow_server: MlflowServer
) -> None:
    """With as many steps, on the classes that the first model has not seen."""
    _, _, base, _, drawn, _ = ran("digits-0-7", tmp_path)
    assert drawn.metrics["recognised"] > 0.9

    def trained(*sets: str) -> dict[str, float]:
        _, _, trained, _, metrics, _ = ran("finetune-digits", tmp_path, *sets)
        made = CheckpointManifest.read(trained.url)
        assert made.card.class_names == ("8", "9")
        assert made.inputs.get(NAME) == (None if "train.init=null" in sets else base.digest)
        return metrics.metrics

    scratch, whole, adapters = trained("train.init=null"), trained(), trained(*ADAPTERS)
    for tuned in (whole, adapters):
        assert recognised(tuned)[0] > recognised(scratch)[1]
        assert tuned["fd_high"] < scratch["fd_low"]
