"""``ditflow deploy``: all flows and recipes as deployments of a Prefect server that runs."""

import sys
from argparse import ArgumentParser, Namespace

from flows.command.deployments import check_project, deploy, read_recipes
from flows.command.options import RECIPE, add_root, complete, preset_names
from flows.prefect_client import prefect_errors
from flows.prefect_server import use_server
from storage.errors import InputError

HELP = "give each recipe a form of its own on the Prefect server in use, and deploy all flows"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = f"{RECIPE}; the first one's values fill the forms of flows that were not deployed yet (default: demo)"
    complete(parser.add_argument("recipe", nargs="*", default=["demo"], help=text), preset_names)
    add_root(parser)


def run(options: Namespace) -> None:
    """Deploy to the server that the environment or Prefect's profile names, else to that of `ditflow up`."""
    check_project()
    if not use_server(options.root):
        raise InputError("deploy: no Prefect server is in use; set PREFECT_API_URL, or run `ditflow up`")
    recipes = read_recipes(options.recipe, options.root)
    with prefect_errors():
        kept = deploy(recipes, options.root, fill=False)
    sys.stdout.write("".join(f"recipe/{each.name}\n" for each in recipes))
    if kept:
        sys.stdout.write(f"as set in the UI, not by the recipe: {', '.join(kept)}\n")
