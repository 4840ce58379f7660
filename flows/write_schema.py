"""Writes the JSON schema of recipes, for editors and for `flows.recipe_schema`: ``python -m flows.write_schema``.

A test compares the file with the classes, so it is written again after every change of a config.
"""

import json
from typing import Any, Final

from pydantic import TypeAdapter

from flows.recipe import Recipe
from flows.recipe_schema import PATH
from flows.sweep import Sweep

THOUSANDS: Final = r"^[-+]?[1-9]\d{0,2}(_\d{3})+$"
"""Text that editors, which read YAML 1.2, see where `flows.yaml_text` sees a number."""


def written() -> str:
    """The schema as text, made from the classes."""
    adapters = [(kind, "validation", TypeAdapter(kind)) for kind in (Sweep, Recipe)]
    made, definitions = TypeAdapter.json_schemas(adapters)  # type: ignore[arg-type]
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe of ditflow",
        "description": "A recipe, or a sweep, which has a base.",
        "if": {"required": ["base"]},
        "then": made[Sweep, "validation"],
        "else": made[Recipe, "validation"],
        **definitions,
    }
    return json.dumps(_for_editors(schema), indent=1, ensure_ascii=False) + "\n"


def _for_editors(value: Any) -> Any:
    """A part of the schema as editors need it: with ``400_000`` as a number, and without places in a form."""
    if isinstance(value, list):
        return [_for_editors(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _for_editors(item) for key, item in value.items() if key != "position" or isinstance(item, dict)}
    if found.get("type") == "integer":
        found |= {"type": ["integer", "string"], "pattern": THOUSANDS}
    return found


if __name__ == "__main__":
    PATH.write_text(written(), "utf-8")
