"""Every fenced block of README and docs: commands go through the real parser, recipes and values through the loader."""

import re
import shlex
from argparse import ArgumentParser
from typing import Any

import pytest
from pages import BLOCKS, REPOSITORY, SENTENCES, Block, commands

from flows.command.main import COMMANDS
from flows.notify import Settings
from flows.recipe import load_recipe, recipe_of
from flows.recipe_file import parse_override, presets, read_values, recipe_path
from flows.sweep import Sweep
from flows.yaml_text import parse

PROGRAMS = [
    *("createdb", "createuser", "curl", "docker", "export", "mlflow", "pip", "podman", "source", "while"),
    ".venv/bin/pre-commit",
]
"""What docs name besides ditflow, make and python. Nothing more of these commands is tested."""
TARGETS = re.findall(r"^(\w[\w-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def _of(*kinds: str) -> Any:
    return pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in BLOCKS if b.kind in kinds])


def test_every_block_says_what_it_is() -> None:
    known = {"sh", "yaml", "python", "diff", "text", "json"}
    assert [block.place for block in BLOCKS if block.kind not in known] == []


@_of("sh")
def test_commands_are_what_the_parsers_take(block: Block) -> None:
    for program, *words in commands(block.text):
        if program == "ditflow":
            _parsed(words)
        elif program == "make":
            target, *rest = words
            assert target in TARGETS
            for word in rest:
                name, _, given = word.partition("=")
                assert name == "ARGS"
                if target in ("demo", "up"):
                    _parsed([target, *shlex.split(given)])
        elif program in ("python", ".venv/bin/python") and words[0] == "-m":
            assert list(REPOSITORY.glob(f"{words[1].replace('.', '/')}*")), words
        else:
            assert program in PROGRAMS


@pytest.mark.parametrize(("page", "words"), SENTENCES, ids=[f"{page}: {shlex.join(w)}" for page, w in SENTENCES])
def test_commands_in_sentences_have_these_names_and_options(page: str, words: list[str]) -> None:
    """They leave out what a reader sees elsewhere, so no parser takes them."""
    program, name, *rest = words
    if program == "make":
        assert name in TARGETS
        return
    if name.startswith("-"):
        return
    parser = ArgumentParser(prog=f"ditflow {name}")
    COMMANDS[name].add_arguments(parser)
    for word in rest:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", parser.format_help())


def _parsed(words: list[str]) -> None:
    """Parse a command line of ditflow, and check the recipe and the values that it names."""
    name, *rest = words
    if name.startswith("-"):
        return
    parser = ArgumentParser(prog=f"ditflow {name}", exit_on_error=False)
    COMMANDS[name].add_arguments(parser)
    options = parser.parse_args(rest)
    recipes = getattr(options, "recipe", None) or []
    sets = getattr(options, "set", [])
    for override in sets:
        parse_override(override)
    for recipe in [recipes] if isinstance(recipes, str) else recipes:
        if recipe in presets():
            values, _ = read_values(recipe, "runs")
            if "base" not in values:
                load_recipe(recipe, [text for text in sets if "<" not in text])
        elif not recipe.startswith("benchmarks/"):  # one that the page has the reader write
            assert recipe.endswith((".yaml", ".yml")), recipe


@_of("yaml")
def test_yaml_is_a_recipe_a_sweep_settings_or_a_part_of_one(block: Block) -> None:
    values = parse(block.text, block.place)
    if "base" in values:
        Sweep.model_validate(values)
    elif values.keys() & Settings.model_fields.keys():
        Settings.model_validate(values)
    else:
        base = {} if "name" in values else read_values("demo", "runs")[0]
        recipe_of(_merged(base, values), block.place, [])


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], more[key]) for key in base.keys() & more.keys() if isinstance(more[key], dict)}
    return base | more | both


def test_what_the_tutorial_shows_of_a_preset_is_in_it() -> None:
    (shown,) = [block for block in BLOCKS if block.page == "docs/tutorial/fine-tune.md" and block.kind == "yaml"]
    preset = parse(recipe_path("finetune-digits").read_text("utf-8"), "finetune-digits")
    assert _merged(preset, parse(shown.text, shown.place)) == preset


@_of("python")
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.place, "exec")
