"""Hook of mkdocs: the pages of the reference that are made from the code, so that they cannot be out of date."""

import json
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import TypeAdapter

from flows.command.main import COMMANDS
from flows.notify import Settings
from flows.recipe_file import presets, recipe_path
from flows.recipe_schema import PATH

REPOSITORY: Final = Path(__file__).parents[2]
PACKAGES: Final = ("flows", "dit", "storage")
MARKS: Final = {"operational": "*operational*"}
BOUNDS: Final = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

Schema = dict[str, Any]


def on_config(config: MkDocsConfig) -> None:
    """Add the pages of the Python API to the navigation."""
    reference = next(entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    reference.append({"Python API": [f"reference/python/{name}.md" for name in modules()]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are made here."""
    pages = {"recipe": recipe_page(), "settings": settings_page()}
    pages |= {"commands": commands_page(), "presets": presets_page()}
    pages |= {f"python/{name}": api_page(name, found) for name, found in modules().items()}
    for name, lines in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines) + "\n"))


def recipe_page() -> list[str]:
    """Every field of a recipe and of a sweep."""
    schema = json.loads(PATH.read_text("utf-8"))
    head = [
        "# Fields of a recipe",
        "",
        "A recipe is a YAML file. Every field is here with its type, its default and its meaning. `--set` takes the"
        " same names with dots between them, such as `train.steps=2000`. A field marked *operational* says how or from"
        " where a stage runs: it is no part of an output's [identity](glossary.md), so another value of it makes the"
        " same output.",
        "",
    ]
    fields = _Fields(schema["$defs"])
    recipe = list(fields.section("", schema["$defs"]["Recipe"], "Recipe", 2))
    return [*head, *recipe, *_Fields(schema["$defs"]).section("", schema["$defs"]["Sweep"], "Sweep", 2)]


def settings_page() -> list[str]:
    """Every field of the settings of ``ditflow up``."""
    schema = TypeAdapter(Settings).json_schema()
    head = ["# Fields of the settings", "", "`ditflow up --settings FILE` reads a YAML file with these fields.", ""]
    return [*head, *_Fields(schema.get("$defs", {})).section("", schema, "Settings", 2)]


class _Fields:
    """Writes the classes of a JSON schema as tables, each class once."""

    def __init__(self, definitions: dict[str, Schema]) -> None:
        self._definitions = definitions
        self._written: set[str] = set()

    def section(self, key: str, node: Schema, title: str, level: int) -> Iterator[str]:
        """A class: its text, the table of its fields, and the classes of its fields."""
        yield from ("#" * min(level, 4) + f" {title}", "", _prose(node.get("description", "")), "")
        yield from ("| field | type | default | |", "|---|---|---|---|")
        required = node.get("required", ())
        for name, field in node["properties"].items():
            default = "required" if name in required else _default(field)
            text = " ".join(filter(None, (_cell(field), *(mark for flag, mark in MARKS.items() if field.get(flag)))))
            dotted = f"{key}.{name}".lstrip(".")
            yield f"| `{dotted}` | {self._type(field)} | {default} | {text} |"
        yield ""
        for name, field in node["properties"].items():
            for kind in self._classes(field):
                if kind in self._written:
                    continue
                self._written.add(kind)
                below = self._definitions[kind]
                dotted = f"{key}.{name}".lstrip(".")
                kinds = below["properties"].get("kind", {}).get("enum", ())
                which = f", kind `{kinds[0]}`" if len(kinds) == 1 else ""
                yield from self.section(dotted, below, f"`{dotted}`{which}", level + 1)

    def _classes(self, node: Schema) -> list[str]:
        if "$ref" in node:
            return [node["$ref"].rpartition("/")[2]]
        below = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]
        below += [node[key] for key in ("items", "additionalProperties") if isinstance(node.get(key), dict)]
        return [kind for each in below for kind in self._classes(each)]

    def _type(self, node: Schema) -> str:
        if "$ref" in node:
            return "fields"
        if choices := node.get("anyOf") or node.get("oneOf") or node.get("allOf"):
            return " or ".join(dict.fromkeys(map(self._type, choices)))
        if values := node.get("enum") or ([node["const"]] if "const" in node else []):
            return ", ".join(f"`{value}`" for value in values)
        kinds = node.get("type", "any value")
        kind = "integer" if kinds == ["integer", "string"] else str(kinds)
        if kind == "array":
            return f"list of {self._type(node.get('items', {}))}"
        bounds = ", ".join(f"{sign} {node[bound]}" for bound, sign in BOUNDS.items() if bound in node)
        return " ".join(filter(None, ({"object": "mapping", "string": "text"}.get(kind, kind), bounds)))


def _default(field: Schema) -> str:
    value = field.get("default")
    if isinstance(value, dict) and value:
        kind = value.get("kind")
        return f"kind `{kind}`" if kind else "as below"
    return f"`{json.dumps(value)}`" if "default" in field else ""


def _cell(field: Schema) -> str:
    return _prose(field.get("description", "")).replace("|", "\\|").replace("\n", " ")


def _prose(text: str) -> str:
    return text.replace("``", "`").replace("<", "&lt;").strip()


def commands_page() -> list[str]:
    """Every command with its arguments."""
    lines = [
        "# Commands",
        "",
        "`ditflow COMMAND --help` prints the same. Exit codes are those of [Resume](../how-to/resume.md#exit-codes).",
        "",
    ]
    for name, command in COMMANDS.items():
        parser = ArgumentParser(prog=f"ditflow {name}", add_help=False)
        command.add_arguments(parser)
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
        lines += [f"## {name}", "", f"{command.HELP[0].upper()}{command.HELP[1:]}.", "", f"    {usage}", ""]
        lines += ["| argument | |", "|---|---|"]
        lines += [_argument(action, parser) for action in parser._actions if action.help != SUPPRESS] + [""]
    return lines


def _argument(action: Action, parser: ArgumentParser) -> str:
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    takes = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or action.dest.upper()}"
    choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    text = (action.help or "") % {"default": action.default, "prog": parser.prog, "choices": action.choices}
    return f"| `{names}{takes}` | {text}{choices} |".replace("<", "&lt;")


def presets_page() -> list[str]:
    """Every preset with what its file says of it, and the file."""
    lines = [
        "# Presets",
        "",
        "The recipes that come with ditflow. `ditflow init mine.yaml --from NAME` makes one of them your own; the"
        " fields are those of [a recipe](recipe.md).",
        "",
    ]
    for name in presets():
        text = recipe_path(name).read_text("utf-8").split("\n", 1)[1]
        comment = [line[2:] for line in text.splitlines() if line.startswith("# ")]
        lines += [f"## {yaml.safe_load(text)['name']}", "", _prose("\n".join(comment)), ""]
        body = "\n".join(line for line in text.splitlines() if not line.startswith("# "))
        lines += ["```yaml", body.strip(), "```", ""]
    return lines


def modules() -> dict[str, list[str]]:
    """The modules of each package, by the package's name."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if parts[-1] != "__init__":
                found.setdefault(".".join(parts[:-1]), []).append(".".join(parts))
    return dict(sorted(found.items()))


def api_page(package: str, names: list[str]) -> list[str]:
    """The public names of a package's modules, from their docstrings."""
    return [f"# {package}", "", *(line for name in names for line in (f"::: {name}", ""))]
