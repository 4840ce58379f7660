"""What would stop a pipeline after hours, found before it writes anything: by the checks of its stages."""

from flows.contract import STAGES
from flows.launch import start
from flows.launch.spec import LocalLaunch
from flows.plan.estimate import copied, estimates, free, no_disk, no_room
from flows.recipe import Recipe
from flows.runner_packages import check_runner
from storage.archives.once import listed
from storage.errors import InputError


def preflight(recipe: Recipe, root: str, *, force: bool = False) -> None:
    """Check a recipe on this machine: what it names, whether it fits together, and the disks.

    Nothing is written and nothing measured. A recipe that passed is not checked again until a stage has run, which
    drops the lists of `listed_once`.
    Outputs that are begun are not counted for the disk, so a recipe is refused only if it cannot fit.

    Args:
        recipe: the recipe.
        root: folder or URL of all outputs.
        force: whether finished stages will run again, into new folders.

    Raises:
        InputError: something would stop a stage; the line says what.
        StorageError: a store does not answer.
    """
    listed((recipe.pipeline_id, root, force), lambda _: _check(recipe, root, force))


def _check(recipe: Recipe, root: str, force: bool) -> None:
    rates = {name: 1.0 for stage in STAGES.values() for name in stage.definition.rates}  # hours do not matter here
    stages = list(estimates(recipe, root, rates, force=force))
    if not stages[0].finished:
        check_runner(recipe.shard.runner)
    if not all(each.finished for each in stages):
        start.check(recipe.launch, root, force=force)
    fresh = [each for each in stages if not each.finished and not each.cost.done]
    problems = list(no_disk(fresh, root, sum(each.cost.size for each in fresh), free(root)))
    if isinstance(recipe.launch, LocalLaunch):
        problems += no_room(copied(stages))
    if problems:
        raise InputError("; ".join(problems))
