"""``ditflow schema``: the JSON schema of recipes, for editors."""

import sys
from argparse import ArgumentParser, Namespace

from flows.recipe_schema import PATH

HELP = "print the JSON schema of recipes, for editors"


def add_arguments(parser: ArgumentParser) -> None:
    """Add no arguments."""


def run(options: Namespace) -> None:
    """Print the schema."""
    sys.stdout.write(PATH.read_text("utf-8"))
