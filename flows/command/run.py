"""``ditflow run``: the pipeline of a recipe, or those of a sweep: in turn, at once, or elsewhere."""

import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from typing import TYPE_CHECKING

from flows import processes
from flows.command.options import add_recipe, add_running, at_least_one
from flows.command.pools import check_name, submit
from flows.contract import ENCODE_HELD_OUT
from flows.launch.spec import NodesLaunch, SlurmLaunch
from flows.prefect_server import serving_prefect
from storage.errors import DitflowError, InputError

if TYPE_CHECKING:
    from flows.recipe import Recipe
    from storage.manifest import Manifest

HELP = "run the whole pipeline of a recipe, or of each recipe of a sweep"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_recipe(parser)
    add_running(parser)
    add_many(parser)


def add_many(parser: ArgumentParser) -> None:
    """Add the options of sweeps, and of work pools."""
    text = "recipes of a sweep that run at once, or tasks of its Slurm array (default: one; all tasks)"
    parser.add_argument("--parallel", type=at_least_one, metavar="N", help=text)
    text = "submit to a work pool of Prefect, and return; the same command again looks how far it is"
    parser.add_argument("--pool", metavar="NAME", help=text)
    parser.add_argument("--queue", metavar="NAME", help="work queue of the pool, such as urgent (default: default)")


def run(options: Namespace) -> None:
    """Run the recipes that are not finished; show the results of all. End what a killed command left open."""
    from flows.sweep import load_recipes

    if options.queue and not options.pool:
        raise InputError("--queue: is one of a work pool; name it with --pool")
    if options.pool and options.force:
        raise InputError("--force: each look at the pool would begin anew; force it in the pool's form")
    if options.pool and options.parallel:
        raise InputError("--parallel: a work pool has limits of its own; leave one of the two out")
    if options.pool:
        check_name(options.pool)
    todo: list[Recipe] = []
    for recipe in load_recipes(options.recipe, options.set, options.root):
        done = None if options.force else recipe.finished(options.root)
        if done is None:
            todo.append(recipe)
        else:
            _skip(options, recipe, done)
    if todo and options.pool:
        submit(todo, options)
    elif todo or processes.others(options.root).killed:
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
    runs.sync_pipeline(recipe.pipeline_id, done, options.root, [*averages, *samples, *further, *encoded])
    over_training.log(next(each for each in done if each.stage == "train"), evaluations, options.root)
    shown = page.Shown(recipe.name, done, options.root, further, held_out)
    page.publish_missing(shown)
    outcomes = [Outcome(name, "skipped", 0.0, each.url) for name, each in shown.lineage]
    milestones = [Outcome(each.stage, "skipped", 0.0, each.url, step) for step, each in evaluations.items()]
    averaged = [Outcome(each.stage, "skipped", 0.0, each.url, std=std) for std, each in widths.items()]
    show(options, recipe.name, [*milestones, *averaged, *outcomes])


def _run(options: Namespace, recipes: "list[Recipe]") -> None:
    from flows.command.members import run_members
    from flows.plan.forecast import forecast
    from flows.plan.preflight import preflight
    from flows.sweep import raise_ends
    from storage.patience import patient

    if options.parallel and any(isinstance(recipe.launch, NodesLaunch) for recipe in recipes):
        raise InputError("--parallel: all nodes of launch.kind: nodes work on one recipe at a time")
    with patient(options.patience):
        for recipe in recipes:  # all, before a server or the first of them writes anything
            preflight(recipe, options.root, force=options.force)
        for recipe in recipes:
            hours = forecast(recipe, options.root, force=options.force)
            sys.stderr.write(f"{hours}\n" if hours else "")
    with serving_prefect(options.root, verbose=options.verbose):
        at_once = options.parallel and len(recipes) > 1 and not any(_is_submitted(recipe) for recipe in recipes)
        failed = run_members(recipes, options) if at_once else _run_in_turn(recipes, options)
    raise_ends(failed, len(recipes))


def _run_in_turn(recipes: "list[Recipe]", options: Namespace) -> dict[str, DitflowError]:
    """Run recipes; return the errors of those that have failed, and what was submitted, by name."""
    from flows.command.outcomes import show
    from flows.launch import slurm
    from flows.perform import RunSettings
    from flows.pipeline import run_pipeline
    from flows.tracking.progress import stages_shown

    settings = RunSettings(root=options.root, force=options.force, patience=options.patience)
    ends: dict[str, DitflowError] = {}
    with ExitStack() as stack:
        jobs = stack.enter_context(slurm.array(options.parallel)) if len(recipes) > 1 else []
        for recipe in recipes:
            try:
                with stages_shown(_rows(recipe)):
                    outcomes = run_pipeline(recipe, settings)
            except DitflowError as error:
                if len(recipes) == 1:
                    raise
                ends[recipe.name] = error
                sys.stderr.write(f"{recipe.name}: {error}\n")
            else:
                show(options, recipe.name, outcomes)
    if jobs:
        sys.stderr.write(f"Slurm jobs {', '.join(jobs)}\n")
    return ends


def _is_submitted(recipe: "Recipe") -> bool:
    return isinstance(recipe.launch, SlurmLaunch) and not recipe.launch.wait


def _rows(recipe: "Recipe") -> list[str]:
    """The stages that will run, as far as they are known."""
    stages = list(recipe.stages)
    if recipe.train.held_out is not None:
        stages.insert(stages.index("train"), ENCODE_HELD_OUT)
    return stages
