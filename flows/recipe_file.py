"""The file of a recipe, read without anything heavy, so that wrong names, keys and plain values are refused at once."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from flows import yaml_text
from flows.recipe_schema import is_text, keys_below, unknown_key, wrong_value
from flows.servers import local_home
from storage import uri
from storage.config import Problem
from storage.errors import InputError

RECIPES = Path(str(files("flows"))) / "recipes"


def presets() -> list[str]:
    """The names of the recipes that come with the package.

    Examples:
        >>> "demo" in presets()
        True
    """
    return sorted(preset.stem for preset in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Where the file of a recipe would be, given the name of a preset or a path."""
    return Path(name) if name.lower().endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"


def read_values(name: str, root: str) -> tuple[dict[str, Any], str]:
    """The values of a recipe's file, whose keys alone are checked, and its path.

    Args:
        name: such as ``demo`` or ``my/recipe.yaml``. In its strings ``${recipe_dir}`` is the file's
            folder and ``${home}`` the local folder of the root.
        root: fsspec URL of the folder that holds every output.

    Raises:
        InputError: there is no such recipe, or a key that no recipe has; the line says where.
    """
    path = recipe_path(name)
    if not path.is_file():
        near = nearest(path.stem, presets())
        text = f"neither a YAML file nor one of the presets ({', '.join(presets())})"
        raise InputError(f"recipe {name!r}: {text}{near and f'; {near}'}")
    places = {"${recipe_dir}": str(path.parent.resolve()), "${home}": str(local_home(root))}
    values = _placed(yaml_text.parse(read_text(path), str(path)), places)
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of names to values")
    check_keys(values, str(path))
    return values, str(path)


def check_names(recipes: Sequence[str], overrides: Sequence[str], root: str) -> None:
    """Refuse what can be refused without the classes of the configs: names, YAML, unknown keys, wrong plain values.

    Args:
        recipes: presets or paths.
        overrides: ``train.steps=2000`` and the like.
        root: fsspec URL of the folder that holds every output.

    Raises:
        InputError: something is wrong; the line says where.
    """
    for values, where in ({}, ""), *(read_values(recipe, root) for recipe in recipes):
        if "base" in values:  # a sweep, which may replace what is wrong in its base
            if isinstance(values["base"], str):
                read_values(values["base"], root)
            continue
        for override in overrides:
            put(values, *parse_override(override))
        wrong = wrong_value(values)
        if wrong is not None:
            raise refusal(wrong, where, overrides)


def refusal(wrong: Problem, where: str, overrides: Sequence[str]) -> InputError:
    """The error that a wrong value of a recipe is.

    Args:
        wrong: the place of the value, and what is wrong.
        where: what to call the recipe's file.
        overrides: what has changed the file's values; the last one of that place is named in place of the file.
    """
    keys = {f"{text.partition('=')[0]}.": text for text in overrides}
    place = f"{wrong.place}."
    overriding = [text for key, text in keys.items() if place.startswith(key) or key.startswith(place)]
    return InputError(f"{f'--set {uri.redact(overriding[-1])}' if overriding else where}: {wrong}")


def parse_override(text: str) -> tuple[str, Any, str]:
    """The dotted key and the value of an override, and how to name it in an error.

    Args:
        text: ``key=value``. The value is taken as it is where the field holds text, unless it is quoted or ``null``;
            everywhere else it is YAML.

    Raises:
        InputError: it is not of that form, not YAML, or has a key that no recipe has.
    """
    where = f"--set {uri.redact(text)}"
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"{where}: write key=value, such as train.steps=2000")
    verbatim = is_text(key.split(".")) and value != "null" and value[:1] not in ("'", '"')
    parsed = value if verbatim else yaml_text.parse(value, where)
    nested: Any = parsed
    for part in reversed(key.split(".")):
        nested = {part: nested}
    check_keys(nested, where)
    return key, parsed, where


def put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the value of a dotted key.

    Raises:
        InputError: a part of the key before the last is a single value.
    """
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"{where}: {parent} is a value and has no fields")
    values[last] = value


def nearest(name: str, known: Iterable[str]) -> str:
    """What the writer of a name that is not known may have meant, as a question; empty if nothing is like it."""
    found = get_close_matches(name, list(known), n=1)
    return f"did you mean {found[0]}?" if found else ""


def check_keys(values: dict[str, Any], where: str) -> None:
    """Check that recipes have all keys of some values.

    Raises:
        InputError: they have not; the line offers the nearest one.
    """
    wrong = unknown_key(values)
    if wrong is not None:
        *parents, last = wrong
        fields = {".".join([*parents, name]): name for name in keys_below(parents)}
        near = get_close_matches(last, list(fields.values()), n=1)
        meant = [key for key, name in fields.items() if name in near] or _elsewhere(last)
        offer = f"; did you mean {' or '.join(meant)}?" if meant else ""
        raise InputError(f"{where}: {'.'.join(wrong)}: no such key{offer}")


def _elsewhere(name: str) -> list[str]:
    """The fields of stages that have a name, which the writer of a short key may have meant."""
    return [f"{stage}.{name}" for stage in keys_below([]) if name in keys_below([stage])]


def read_text(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        InputError: it cannot be read as text.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error


def _placed(value: Any, places: Mapping[str, str]) -> Any:
    """A YAML value with the placeholders in its strings filled in."""
    if isinstance(value, dict):
        return {key: _placed(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, places) for item in value]
    if isinstance(value, str):
        return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], value)
    return value
