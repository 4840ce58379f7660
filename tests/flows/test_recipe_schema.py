"""The schema of recipes: what editors say of a file, and the keys that are offered."""

import re
from copy import deepcopy
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from flows.recipe import Recipe
from flows.recipe_file import RECIPES, presets, put, read_values
from flows.recipe_schema import PATH, all_keys, is_text, keys_below, unknown_key, wrong_value
from flows.write_schema import written
from storage.config import Problem, problem
from storage.errors import InputError


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found = yaml.safe_load(PATH.read_text("utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_file_is_that_of_the_configs() -> None:
    assert PATH.read_text("utf-8") == written(), "run python -m flows.write_schema"


@pytest.mark.parametrize("name", presets())
def test_a_preset_names_its_schema_and_fits_it_as_an_editor_reads_it(name: str, schema: dict[str, Any]) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    first = text.splitlines()[0]
    assert (RECIPES / first.removeprefix("# yaml-language-server: $schema=")).samefile(PATH)
    as_editors_read = re.sub(r"\b(\d{1,3}(_\d{3})+)\b", r'"\1"', text)
    assert ('"' in as_editors_read) == ("_0" in text)
    jsonschema.validate(yaml.safe_load(as_editors_read), schema)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"train": {"stepz": 3}}, "stepz"),
        ({"train": {"steps": 0}}, "minimum"),
        ({"train": {"steps": "many"}}, "many"),
        ({"base": "demo", "vari": {}}, "vari"),
    ],
)
def test_what_is_wrong_is_underlined(values: dict[str, Any], place: str, schema: dict[str, Any]) -> None:
    recipe = {"name": "mine", "archive": {"train": "here"}, "encode": {"resolution": 32}}
    errors = jsonschema.Draft7Validator(schema).iter_errors(values if "base" in values else recipe | values)
    assert place in " ".join(str(error) for error in errors)


def test_keys() -> None:
    assert {"name", "train", "sample"} <= set(keys_below([]))
    assert {"kind", "nproc", "image"} <= set(keys_below(["launch"]))
    assert "source" in keys_below(["encode", "vae"])
    assert keys_below(["train", "steps"]) == keys_below(["nowhere"]) == []


@pytest.mark.parametrize(
    ("values", "unknown"),
    [
        ({"train": {"steps": 3}}, None),
        ({"train": None}, None),
        ({"train": {"steps": {"x": 1}}}, None),  # for the config to refuse
        ({"sample": {"labels": {"any": 1}}}, None),
        ({"launch": {"options": {"any-thing": 1}}}, None),
        ({"train": {"model": {"kind": "dit", "sise": "B"}}}, ["train", "model", "sise"]),
        ({"base": "demo", "vary": {"train.steps": [1]}}, None),
        ({"base": "demo", "train": {}}, ["train"]),
    ],
)
def test_unknown_keys(values: dict[str, Any], unknown: list[str] | None) -> None:
    assert unknown_key(values) == unknown


@pytest.mark.parametrize("key", ["name", "train.decay", "train.init.source", "encode.vae.source", "launch.volumes.any"])
def test_a_field_that_holds_text_alone(key: str) -> None:
    assert is_text(key.split("."))


@pytest.mark.parametrize(
    "key", ["train.steps", "train.model.size", "train", "sample.labels", "sample.labels.any", "nothing", "name.below"]
)
def test_a_field_that_holds_something_else(key: str) -> None:
    assert not is_text(key.split("."))


@pytest.mark.parametrize("name", presets())
def test_no_preset_has_a_wrong_value(name: str) -> None:
    assert wrong_value(read_values(name, "runs")[0]) is None


def test_a_wrong_value_is_refused_in_the_words_of_the_class() -> None:
    recipe, _ = read_values("demo-milestones", "runs")
    same: set[str] = set()
    for key in all_keys():
        for value in ("abc", -1, 1.5, None):
            values = deepcopy(recipe)
            try:
                put(values, key, value, "")
            except InputError:  # what is above the key has no fields
                continue
            wrong = wrong_value(_alone(values, key.split(".")))
            if wrong is not None:
                refused = _refused_by_the_class(values)
                assert refused is not None, (key, value)
                assert refused == wrong or refused.message == "Field required", (key, value)
                same |= {key} if refused == wrong else set()
    assert len(same) > 100
    assert {"train.steps", "train.flips", "train.decay", "sample.guidance_scale", "name"} <= same


def _alone(values: Any, parts: list[str]) -> Any:
    """A value of a recipe without others beside it, but for the kinds of what holds it."""
    if not parts:
        return values
    chosen = {name: values[name] for name in (parts[0], "kind") if name in values}
    return chosen | {parts[0]: _alone(values[parts[0]], parts[1:])}


def _refused_by_the_class(values: dict[str, Any]) -> Problem | None:
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        return problem(error, values)
    return None
