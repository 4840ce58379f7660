"""What a run says of its hours before it starts."""

import re
from pathlib import Path

import pytest
from command_line import tiny, write_images

from flows.plan import forecast as module
from flows.plan.forecast import fast, forecast
from flows.recipe import Recipe, load_recipe

LONG = "sample.count=50_000_000"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def recipe_of(images: Path, root: Path, *more: str) -> Recipe:
    return load_recipe("demo", tiny(images, root, *more)[3::2], str(root))


def test_hours_are_told_and_the_longest_stage(images: Path, tmp_path: Path) -> None:
    said = forecast(recipe_of(images, tmp_path / "root", LONG), str(tmp_path / "root"))
    assert said is not None
    found = re.fullmatch(
        r"demo: about ([\d,.]+) hours on this machine, ([\d,.]+) of them for \w+ \(50,000,0\d\d images\); .*", said
    )
    assert found, said
    total, longest = (float(number.replace(",", "")) for number in found.groups())
    assert total >= longest > 1


def test_a_short_recipe_is_not_measured(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG", 0.0)
    assert forecast(recipe_of(images, tmp_path / "root"), str(tmp_path / "root")) is None


def test_hours_of_a_cluster_are_not_measured_here(images: Path, tmp_path: Path) -> None:
    recipe = recipe_of(images, tmp_path / "root", LONG, "launch={kind: slurm}")
    assert forecast(recipe, str(tmp_path / "root")) is None


def test_every_rate_has_a_bound() -> None:
    assert {"shard", "list", "load", "encode", "train", "sample", "decode", "evaluate", "compare"} == fast().keys()
    assert fast()["train"] == fast()["sample"] > fast()["encode"]
