"""What ``ditflow gc`` keeps, and why: pins, registered versions, recipes, and work in progress."""

from collections.abc import Iterator, Mapping, Sequence

from dit.metrics.reference import ReferenceManifest
from flows import claims
from flows.contract import STAGES
from flows.inventory import Inventory, is_of, recipe_of
from flows.launch import slurm_queue
from flows.recipe import Recipe
from flows.recipe_file import recipe_path
from flows.registry.versions import knows_run, versions
from flows.report.kept import ReportManifest, ScalingManifest
from flows.sweep import load_recipes
from storage import uri
from storage.errors import InputError
from storage.manifest import key_of
from storage.root import Output, State

WORKING = "being worked with"
PAGES = (ReportManifest.STAGE, ScalingManifest.STAGE)
"""Stages of which nothing is made: a page stays as long as all that it shows."""
FIRST = (ReferenceManifest.STAGE, *(name for name, stage in STAGES.items() if stage.reads is None))
"""Stages whose outputs are made from no others."""


def reasons(inventory: Inventory, recipes: Sequence[str]) -> dict[str, str]:
    """Why outputs are to stay, by their keys. What they were made from stays too.

    Args:
        inventory: of the root.
        recipes: presets, YAML files, or names of recipes as `ditflow ls` shows them.

    Raises:
        InputError: there is no such recipe, or its archive or a model that it starts from is gone.
        DitflowError: MLflow does not answer, or somebody's list of what he needs cannot be read.
        StorageError: the store does not answer.
    """
    found = {pin.key: f"pinned by {pin.who}{pin.reason and ': '}{pin.reason}" for pin in inventory.pins}
    found |= _registered(inventory)
    for name in recipes:
        found |= dict.fromkeys(_of(name, inventory), f"recipe {name}")
    running = claims.flow_runs(inventory.root)
    working = [each.key for each in inventory.outputs if _flow_run(each) in running]
    working += [each.key for each in inventory.outputs if _is_submitted(each)]
    found |= dict.fromkeys(working, WORKING)
    return found | dict.fromkeys(claims.claimed(inventory.root), WORKING)


def _flow_run(output: Output) -> str | None:
    return output.facts.provenance.prefect_flow_run_id if output.facts else None


def _is_submitted(output: Output) -> bool:
    """Whether a job of Slurm makes it, or nobody has looked yet how that has ended."""
    return output.state is not State.FINISHED and uri.exists(uri.join(output.url, slurm_queue.FOLDER, slurm_queue.NOTE))


def _registered(inventory: Inventory) -> Mapping[str, str]:
    """Outputs that registered versions were made from. A registration stays unless its version was deleted."""
    of_digest = {digest: f"registered: {version}" for version in versions(inventory.root) for digest in version.digests}
    found = {}
    for each in inventory.outputs:
        facts = each.facts
        if facts is not None and facts.digest in of_digest:
            found[each.key] = of_digest[facts.digest]
        elif facts is not None and facts.model_name is not None:
            run_id = facts.provenance.mlflow_run_id
            if run_id is None or not knows_run(run_id, inventory.root):
                found[each.key] = f"registered as {facts.model_name}/{facts.model_version}, in another MLflow"
    return found


def _of(name: str, inventory: Inventory) -> set[str]:
    """The outputs that a recipe names, finished or not, and those that its pipeline has made."""
    if not recipe_path(name).is_file():
        made = {each.key for each in inventory.outputs if is_of(each, name)}
        if not made:
            raise InputError(f"{name}: neither a recipe nor the name of one that `ditflow ls` shows")
        return made
    recipes = load_recipes(name, [], inventory.root)
    ids = {recipe.pipeline_id for recipe in recipes}
    made = {each.key for each in inventory.outputs if recipe_of(each) in ids}
    return made | {key for recipe in recipes for key in _named(recipe, inventory.root)}


def _named(recipe: Recipe, root: str) -> Iterator[str]:
    """The keys of a recipe's outputs, up to the first that is not finished."""
    outputs = list(recipe.outputs(root, recipe.stages))
    yield from (key_of(output.uri) for output, _ in outputs)
    made = {manifest.stage: manifest for _, manifest in outputs if manifest is not None}
    manifests = list(made.values())
    held_out = recipe.held_out(manifests, root) if "shard" in made else None
    evaluations = recipe.evaluations(root, manifests) if "encode" in made else {}
    widths = recipe.widths(root, manifests) if "train" in made else {}
    for each in (held_out, *evaluations.values(), *widths.values()):
        if each is not None:
            yield key_of(each.uri)
