"""``ditflow run``: the pipeline of a recipe, or those of a sweep in turn."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from flows import processes
from flows.command.options import add_recipe, add_running
from flows.command.prefect_server import serving_prefect

if TYPE_CHECKING:
    from flows.recipe import Recipe
    from storage.manifest import Manifest

HELP = "run the whole pipeline of a recipe, or of each recipe of a sweep"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_recipe(parser)
    add_running(parser)


def run(options: Namespace) -> None:
    """Run the recipes that are not finished; show the results of all. End what a killed command left open."""
    from flows.sweep import load_recipes

    todo: list[Recipe] = []
    for recipe in load_recipes(options.recipe, options.set, options.root):
        done = None if options.force else recipe.finished(options.root)
        if done is None:
            todo.append(recipe)
        else:
            _skip(options, recipe, done)
    if todo or processes.others(options.root).killed:
        _run(options, todo)


def _skip(options: Namespace, recipe: "Recipe", done: "list[Manifest]") -> None:
    from dit.sample import SampleManifest
    from flows.command.outcomes import show
    from flows.contract import Outcome
    from flows.over_training import model_of
    from flows.report import page
    from flows.tracking import over_training, runs

    evaluations = {step: each for step, each in recipe.evaluations(options.root, done).items() if each}
    widths = {std: each for std, each in recipe.widths(options.root, done).items() if each}
    further, held_out = [*evaluations.values(), *widths.values()], recipe.held_out(done, options.root)
    samples = [each.parent("samples", SampleManifest) for each in further]
    averages, encoded = [model_of(each) for each in widths.values()], [held_out] if held_out else []
    runs.sync_pipeline(recipe.pipeline_id, [*averages, *samples, *further, *encoded, *done], options.root)
    over_training.log(next(each for each in done if each.stage == "train"), evaluations, options.root)
    shown = page.Shown(recipe.name, done, options.root, further, held_out)
    page.publish_missing(shown)
    outcomes = [Outcome(name, "skipped", 0.0, each.url) for name, each in shown.lineage]
    milestones = [Outcome(each.stage, "skipped", 0.0, each.url, step) for step, each in evaluations.items()]
    averaged = [Outcome(each.stage, "skipped", 0.0, each.url, std=std) for std, each in widths.items()]
    show(options, recipe.name, [*milestones, *averaged, *outcomes])


def _run(options: Namespace, recipes: "list[Recipe]") -> None:
    from flows.plan.preflight import preflight
    from storage.patience import patient

    with patient(options.patience):
        for recipe in recipes:  # all, before a server or the first of them writes anything
            preflight(recipe, options.root, force=options.force)
    with serving_prefect(options.root, quiet=options.json):
        from flows.command.outcomes import show
        from flows.perform import RunSettings
        from flows.pipeline import pipeline

        settings = RunSettings(root=options.root, force=options.force, patience=options.patience)
        for recipe in recipes:
            show(options, recipe.name, pipeline(recipe, settings))
