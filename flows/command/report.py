"""``ditflow report``: the HTML report of a finished recipe."""

from argparse import ArgumentParser, Namespace

from flows.command.options import add_recipe, add_root, add_set, check_done
from storage.errors import InputError

HELP = "write the HTML report of a finished recipe"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_recipe(parser)
    add_root(parser)
    add_set(parser, "the same KEY=VALUE that the recipe was run with")


def run(options: Namespace) -> None:
    """Write the report if it is missing; print its URL."""
    check_done("report", "train", options.root, f"recipe {options.recipe} is not finished; run it first")
    from flows.recipe import load_recipe
    from flows.report.page import Shown, page_url, write_page

    recipe = load_recipe(options.recipe, options.set, options.root)
    done = recipe.finished(options.root)
    if done is None:
        raise InputError(f"report: recipe {recipe.name} is not finished; {recipe.unfinished(options.root)}")
    further, held_out = recipe.further(options.root, done), recipe.held_out(done, options.root)
    shown = Shown(recipe.name, done, options.root, further, held_out)
    write_page(shown)
    print(page_url(shown))
