"""A sweep: several recipes that differ in a few values."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from typing import Any

from pydantic import Field, ValidationError

from flows.recipe import Recipe, recipe_of
from flows.recipe_file import put, read_values
from storage.config import Config, problem
from storage.errors import DitflowError, InputError, SubmittedError


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

    Examples:
        >>> [recipe.name for recipe in load_recipes("demo-scaling")][:2]
        ['demo-scaling-1x32x2', 'demo-scaling-2x32x2']
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


def raise_ends(ends: Mapping[str, DitflowError], count: int) -> None:
    """Raise what recipes of a sweep have ended with, if one has failed or was submitted.

    Args:
        ends: the errors by the names of the recipes.
        count: how many recipes the sweep has.

    Raises:
        DitflowError: some have failed.
        SubmittedError: none has, but the work of some goes on elsewhere.
    """
    failed = {name: error for name, error in ends.items() if not isinstance(error, SubmittedError)}
    if failed:
        kinds = {type(error) for error in failed.values()}
        said = "; ".join(f"{name}: {error}" for name, error in failed.items())
        text = f"{len(failed)} of {count} recipes have failed; the same command runs them again; {said}"
        raise (kinds.pop() if len(kinds) == 1 else DitflowError)(text)
    if ends:
        raise SubmittedError(f"{len(ends)} of {count} recipes; run the same command again to look")


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
