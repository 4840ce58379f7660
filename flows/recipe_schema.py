"""The JSON schema of recipes and sweeps, by which keys and plain values are known without importing the configs.

`flows.write_schema` writes it.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, create_model

from storage.config import Config, Problem, problem

PATH: Final = Path(str(files("flows"))) / "recipes" / "recipe.schema.json"

Schema = dict[str, Any]
_PLAIN = {"integer": int, "number": float, "boolean": bool, "string": str}
_LIMITS = {
    "minimum": "ge",
    "exclusiveMinimum": "gt",
    "maximum": "le",
    "exclusiveMaximum": "lt",
    "pattern": "pattern",
    "minLength": "min_length",
    "maxLength": "max_length",
}
"""The keys of the schema that limit a plain value, and what pydantic calls them."""


class _Values(Config, use_attribute_docstrings=False):
    """Fields without help, which pydantic would look for in the source of each new class."""


def keys_below(parts: Sequence[str]) -> list[str]:
    """The names of the fields of a dotted key, of the recipe itself without parts; empty for a value without fields."""
    nodes = _below(list(parts))
    return list(dict.fromkeys(name for node in nodes for name in node.get("properties", {})))


def all_keys() -> list[str]:
    """The dotted keys of all values of a recipe that have no fields, those of each kind of a union included."""

    def below(parts: list[str]) -> Iterator[str]:
        names = keys_below(parts)
        for name in names:
            yield from below([*parts, name])
        if not names:
            yield ".".join(parts)

    return list(below([]))


def values_of(parts: Sequence[str]) -> list[str]:
    """The values that a dotted key can have, if they can be listed."""
    found: list[Any] = []
    for node in _below(list(parts)):
        found += node.get("enum", []) + ([node["const"]] if "const" in node else [])
        found += [True, False] if node.get("type") == "boolean" else []
    return [json.dumps(each) if isinstance(each, bool) else str(each) for each in found]


def is_text(parts: Sequence[str]) -> bool:
    """Whether the field at a dotted key holds only text or null; in a union, in every member that has it."""
    types = {str(node.get("type")) for node in _below(list(parts))} - {"null"}
    return types == {"string"}


def wrong_value(values: dict[str, Any]) -> Problem | None:
    """The first value that its class would refuse for itself, in the same words; None if there is none.

    Only plain fields are looked at: a number, truth value, text or word of a list. The classes judge all others.

    Args:
        values: those of a recipe or of some of its keys, all of which a recipe can have.
    """
    try:
        _mirror(_below([]), values).model_validate(values)
    except ValidationError as error:
        return problem(error, values)
    return None


def _mirror(nodes: list[Schema], values: dict[str, Any]) -> type[Config]:
    """A config that has the given fields alone, and checks those that are plain."""
    fields = {name: (_kind(_fields(nodes, name), value), ...) for name, value in values.items()}
    made: type[Config] = create_model("Values", __base__=_Values, **fields)  # type: ignore[call-overload]
    return made


def _kind(nodes: list[Schema], value: Any) -> Any:
    """The type of a field as its class has it; `Any` if it is not plain."""
    others = [node for node in nodes if node.get("type") != "null"]
    if isinstance(value, dict) and others and all("properties" in node for node in others):
        kind = value.get("kind", "local")
        chosen = [node for node in others if kind in node["properties"].get("kind", {}).get("enum", [])]
        below = others if len(others) == 1 else chosen
        return _mirror(below, value) if below else Any
    plain = {json.dumps([node.get(key) for key in ("type", "enum", *_LIMITS)]) for node in others}
    if len(plain) != 1:
        return Any
    kind, words, *limits = json.loads(plain.pop())
    name = kind[0] if isinstance(kind, list) else kind  # of an integer, which editors may see as text
    if name not in _PLAIN:
        return Any
    bounds = dict(zip(_LIMITS.values(), limits, strict=True))
    if name != "string":
        del bounds["pattern"]
    found = Literal[tuple(words)] if words else Annotated[_PLAIN[name], Field(**bounds)]
    return found if len(others) == len(nodes) else found | None


def unknown_key(values: dict[str, Any]) -> list[str] | None:
    """The parts of the first key that no recipe and no sweep can have; None if there is none.

    A key that one kind of a union has counts as known, and so does every key of a mapping with free names.
    """
    return next(_unknown(_below([], sweep="base" in values), values, []), None)


def _unknown(nodes: list[Schema], values: Any, parts: list[str]) -> Iterator[list[str]]:
    if not isinstance(values, dict) or any(map(_takes_any_key, nodes)):
        return
    for key, value in values.items():
        below = [*parts, str(key)]
        found = _fields(nodes, str(key))
        if not found and any("properties" in node for node in nodes):
            yield below
        yield from _unknown(found, value, below)


def _takes_any_key(node: Schema) -> bool:
    return "properties" not in node and (node.get("type") == "object" or not {"type", "const", "enum"} & node.keys())


def _below(parts: list[str], *, sweep: bool = False) -> list[Schema]:
    nodes = list(_members(_schema()["then" if sweep else "else"]))
    for part in parts:
        nodes = _fields(nodes, part)
    return nodes


def _fields(nodes: list[Schema], name: str) -> list[Schema]:
    found = [node["properties"][name] for node in nodes if name in node.get("properties", {})]
    found += [node["additionalProperties"] for node in nodes if isinstance(node.get("additionalProperties"), dict)]
    return [member for field in found for member in _members(field)]


def _members(node: Schema) -> Iterator[Schema]:
    """A node of the schema with references followed, or the nodes that it is a choice of."""
    if "$ref" in node:
        yield from _members(_schema()["$defs"][node["$ref"].rpartition("/")[2]])
        return
    choices = [choice for kind in ("anyOf", "oneOf", "allOf") for choice in node.get(kind, ())]
    for choice in choices:
        yield from _members(choice)
    if not choices:
        yield node


@cache
def _schema() -> Schema:
    schema: Schema = json.loads(PATH.read_text("utf-8"))
    return schema
