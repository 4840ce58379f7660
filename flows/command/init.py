"""``ditflow init``: a recipe of one's own, copied from a preset."""

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from flows.command.options import complete, preset_names
from flows.recipe_file import read_text, read_values, recipe_path
from flows.recipe_schema import PATH
from storage.errors import InputError

HELP = "write a recipe of one's own, from a preset"
SCHEMA = "# yaml-language-server: $schema="
"""Begins the line that tells editors where the schema of a file is."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", type=Path, help="the new YAML file; its stem is the recipe's name")
    text = "preset or YAML file to copy, with its comments (default: demo)"
    complete(parser.add_argument("--from", dest="source", default="demo", metavar="RECIPE", help=text), preset_names)


def run(options: Namespace) -> None:
    """Write the file; print what to do with it."""
    path: Path = options.file
    if path.suffix.lower() not in (".yaml", ".yml") or not re.fullmatch(r"[A-Za-z0-9._-]+", path.stem):
        raise InputError(f"{path}: name it like mine.yaml; a recipe's name has letters, digits, '.', '_' and '-' alone")
    values, _ = read_values(options.source, "runs")
    text = recipe_of(path.stem, recipe_path(options.source))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another file") from error
    archive = read_text(recipe_path(str(values.get("base", options.source))))
    run_it = "demo --recipe" if "${home}/digits" in archive else "run"  # which writes the digits first
    print(f"{path} is written; change it, then run\n  ditflow {run_it} {path}")


def recipe_of(name: str, source: Path) -> str:
    """The text of a recipe as one of another name, at any place, which registers models of its own.

    Args:
        name: the new name.
        source: the file of the recipe.
    """
    text, folder = read_text(source).removeprefix(f"{SCHEMA}recipe.schema.json\n"), source.parent.resolve()
    text = re.sub(r"^name: .*$", f"name: {name}", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^(  model_name:) .*$", rf"\1 {name}", text, flags=re.MULTILINE)
    text = text.replace("${recipe_dir}/..", str(folder.parent)).replace("${recipe_dir}", str(folder))
    first = f"{SCHEMA}{PATH.as_uri()}\n"
    return text if text.startswith(first) else first + text
