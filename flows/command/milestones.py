"""``ditflow milestones``: evaluate the milestones of a recipe while another process trains it."""

from argparse import ArgumentParser, Namespace

from flows.command.options import add_recipe, add_running
from flows.prefect_server import serving_prefect

HELP = "evaluate the milestones of a recipe while it trains elsewhere, until its last step"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_recipe(parser)
    add_running(parser)


def run(options: Namespace) -> None:
    """Evaluate what is there and wait for the rest."""
    from flows.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set, options.root)
    recipe.asked_over_training()  # before servers start
    with serving_prefect(options.root, verbose=options.verbose):
        from flows.command.outcomes import show
        from flows.milestones import milestones
        from flows.perform import RunSettings

        settings = RunSettings(root=options.root, force=options.force, patience=options.patience)
        show(options, recipe.name, milestones(recipe, settings))
