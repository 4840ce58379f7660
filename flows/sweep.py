"""A sweep: several recipes that differ in a few values."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from typing import Any

from pydantic import Field, ValidationError

from flows.recipe import Recipe, put, read_values, recipe_of
from storage.config import Config, problem
from storage.errors import InputError


class Sweep(Config):
    """A base recipe and the values to try in it. Stages that the recipes share run once."""

    name: str
    """Name of the sweep. Each recipe is named by it and its own values."""
    base: str
    """The base recipe: a preset or the path of a YAML file."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Values by dotted key that replace those of the base in every recipe."""
    vary: dict[str, list[Any]] = Field(min_length=1)
    """Lists of values by dotted key: one recipe for each combination, the last key varying fastest."""


def load_recipes(name: str, overrides: Sequence[str] = (), root: str = "runs") -> list[Recipe]:
    """The recipe of that name, or those of a sweep.

    Args:
        name: a preset or the path of a YAML file.
        overrides: as for `load_recipe`; they hold for every recipe.
        root: fsspec URL of the folder that holds every output.

    Raises:
        InputError: there is no such recipe, or something in it is wrong; the line says where.
    """
    values, where = read_values(name, root)
    if "base" not in values:
        return [recipe_of(values, where, overrides)]
    try:
        sweep = Sweep.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {problem(error, values)}") from error
    base, _ = read_values(sweep.base, root)
    return [_variant(sweep, deepcopy(base), chosen, where, overrides) for chosen in product(*sweep.vary.values())]


def _variant(
    sweep: Sweep, values: dict[str, Any], chosen: tuple[Any, ...], where: str, overrides: Sequence[str]
) -> Recipe:
    name = "-".join([sweep.name, *map(_word, chosen)])
    changes = sweep.change | dict(zip(sweep.vary, chosen, strict=True)) | {"name": name}
    for key, value in changes.items():
        put(values, key, value, where)
    return recipe_of(values, where, overrides)


def _word(value: Any) -> str:
    """What a value is called in a recipe's name: a shape by its numbers, such as 4x128x4."""
    return "x".join(map(str, value.values())) if isinstance(value, dict) else str(value)
