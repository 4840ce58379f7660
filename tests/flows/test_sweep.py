from pathlib import Path

import pytest

from flows.recipe import load_recipe
from flows.recipe_file import RECIPES
from flows.sweep import load_recipes
from storage.errors import InputError

SWEEP = """
name: mine
base: demo
change: {train.steps: 7}
vary:
  train.model.patch_size: [4, 2]
  train.seed: [0, 1]
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SWEEP)
    return path


def test_one_recipe_for_each_combination(sweep: Path) -> None:
    recipes = load_recipes(str(sweep), ["sample.count=8"])
    assert [recipe.name for recipe in recipes] == ["mine-4-0", "mine-4-1", "mine-2-0", "mine-2-1"]
    assert [(r.train.model.patch_size, r.train.seed) for r in recipes] == [(4, 0), (4, 1), (2, 0), (2, 1)]
    assert {(recipe.train.steps, recipe.sample.count) for recipe in recipes} == {(7, 8)}
    base = load_recipe("demo")
    assert {(recipe.encode, recipe.archive) for recipe in recipes} == {(base.encode, base.archive)}


def test_a_recipe_is_a_sweep_of_one() -> None:
    assert load_recipes("demo", ["train.steps=3"]) == [load_recipe("demo", ["train.steps=3"])]


def test_every_preset_loads() -> None:
    for path in RECIPES.glob("*.yaml"):
        assert all(recipe.name.startswith(path.stem) for recipe in load_recipes(path.stem))


def test_the_twelve_sizes() -> None:
    recipes = load_recipes("imagenet256-dit-sweep")
    assert [recipe.name.removeprefix("imagenet256-dit-sweep-") for recipe in recipes] == [
        f"{size}-{patch}" for size in ("S", "B", "L", "XL") for patch in (8, 4, 2)
    ]
    assert {recipe.train.steps for recipe in recipes} == {400_000}
    assert {recipe.sample.guidance_scale for recipe in recipes} == {1.0}
    assert {recipe.encode for recipe in recipes} == {load_recipe("imagenet256-dit").encode}  # and its chunks of 2 MiB


def test_a_sweep_is_no_recipe(sweep: Path) -> None:
    with pytest.raises(InputError, match=r"mine\.yaml: a sweep of several recipes; run it whole"):
        load_recipe(str(sweep))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SWEEP.replace("base: demo", "base: nobody"), "recipe 'nobody': neither a YAML file nor"),
        (SWEEP.replace("train.seed", "train.sede"), "mine.yaml: train.sede: no such key"),
        (SWEEP.replace("[0, 1]", "[0, -1]"), "mine.yaml: train.seed: Input should be greater"),
        (SWEEP.replace("train.steps: 7", "name.x: 7"), "mine.yaml: name is a value"),
        ("name: mine\nbase: demo\n", "mine.yaml: vary: Field required"),
        ("name: mine\nbase: demo\nvary: {}\n", "mine.yaml: vary: Dictionary should have at least 1 item"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(sweep: Path, text: str, reason: str) -> None:
    sweep.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipes(str(sweep))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
