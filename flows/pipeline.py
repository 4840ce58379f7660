"""The pipeline: images become tars, latents, a checkpoint, samples, metrics, and a model version."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from pydantic import Field

from dit.export import CheckpointManifest
from flows import processes
from flows.contract import ENCODE_HELD_OUT, STAGES, Outcome
from flows.launch import slurm
from flows.launch.spec import AsRecipe, LaunchChoice
from flows.milestones import evaluate_milestones
from flows.names import named
from flows.over_training import evaluations_of
from flows.over_widths import OverWidths
from flows.perform import RunSettings
from flows.plan.preflight import preflight
from flows.recipe import Recipe
from flows.refusing import SUBMITTED, RefusingFlow
from flows.report.page import Shown, publish
from flows.stages import HERE, run_flow, run_stage
from flows.sweep import load_recipes, raise_ends
from flows.tracking import runs
from storage.archives.open import HELD_OUT, ArchiveRef
from storage.config import Location
from storage.errors import DitflowError, SubmittedError
from storage.manifest import Manifest
from storage.patience import patient

Override = Annotated[str, Field(pattern=".+=")]
AS_RECIPE = AsRecipe()


@RefusingFlow
def recipe(
    recipe: str, set: Sequence[Override] = (), launch: LaunchChoice = AS_RECIPE, root: Location = HERE.root
) -> list[Outcome]:
    """Run a recipe by its name: all its stages in turn, of which finished ones are skipped; or all those of a sweep.

    Args:
        recipe: Name of a preset, or path of a YAML file.
        set: Values to change, one an item, such as train.steps=2000.
        launch: Where the ranks run.
        root: Folder or fsspec URL of all outputs.
    """
    launched = [] if isinstance(launch, AsRecipe) else [f"launch={launch.model_dump_json()}"]
    recipes, settings = load_recipes(recipe, [*launched, *set], root), RunSettings(root=root)
    if len(recipes) == 1:
        return run(recipes[0], settings)
    outcomes, ends = list[Outcome](), dict[str, DitflowError]()
    with slurm.array():
        for each in recipes:
            try:
                outcomes += run_pipeline(each, settings)
            except DitflowError as error:
                ends[each.name] = error
    raise_ends(ends, len(recipes))
    return outcomes


@RefusingFlow
def pipeline(recipe: Recipe, settings: RunSettings = HERE) -> list[Outcome]:
    """Check that every stage can run, and run them in turn. Finished stages are skipped.

    Milestones and averages of several widths are evaluated after training, if the recipe asks for it. If a stage is a
    job for which nobody waits, the flow ends in the state ``Submitted``; started again, it looks and goes on.
    """
    return run(recipe, settings)


def run_pipeline(recipe: Recipe, settings: RunSettings) -> list[Outcome]:
    """Run the flow of a recipe here.

    Raises:
        SubmittedError: a stage is a job for which nobody waits.
    """
    state: State[Any] = pipeline(recipe, settings, return_state=True)
    if state.name == SUBMITTED:
        raise SubmittedError(state.message or "")
    outcomes: list[Outcome] = state.result()
    return outcomes


def run(recipe: Recipe, settings: RunSettings) -> list[Outcome]:
    """Run a recipe in the flow run that calls this."""
    processes.note(flow_run.id, settings.root)
    called = named(recipe.pipeline_id)
    settings = settings.model_copy(update={"pipeline_id": recipe.pipeline_id})
    outcomes: list[Outcome] = []
    sources: dict[str | None, ArchiveRef | str] = {None: recipe.archive}
    with patient(settings.patience):
        preflight(recipe, settings.root, force=settings.force)
        params = recipe.model_dump(mode="json")
        typed = called if called != recipe.pipeline_id else None
        with runs.pipeline_run(recipe.pipeline_id, settings.root, typed, params) as run_id:
            for name in recipe.stages:
                if name == "train":
                    outcomes += encode_held_out(recipe, sources, settings)
                outcome = run_stage(name, recipe, sources[recipe.reads(name)], settings)
                outcomes.append(outcome)
                sources[name] = outcome.manifest
                if name == "train" and recipe.evaluate_milestones:
                    outcomes += evaluate_milestones(recipe, str(sources["encode"]), outcome.manifest, settings)
                if name == "train" and recipe.registry.checkpoint == "best":
                    sources[name] = _chosen(recipe, outcome.manifest, outcomes)
                if name == "train" and recipe.over_widths:
                    outcomes += evaluate_widths(recipe, recipe.over_widths, outcome.manifest, settings)
                if name == "average":
                    sources["train"] = outcome.manifest
            shown = Shown.of(recipe.name, outcomes, settings.root)
            publish(shown, run_id)
            own = {stage.url for stage in shown.stages}
            further = [Manifest.read(outcome.manifest) for outcome in outcomes if outcome.manifest not in own]
            runs.sync_pipeline(recipe.pipeline_id, shown.stages, settings.root, further)
    create_table_artifact([asdict(outcome) for outcome in outcomes], key="pipeline-stages", description=recipe.name)
    return outcomes


def evaluate_widths(recipe: Recipe, asked: OverWidths, trained: str, settings: RunSettings) -> list[Outcome]:
    """Make the averages of a training run of all widths that are asked for, and evaluate them in the same way."""
    outcomes = []
    for std in asked.averages:
        source = trained
        for name, config in asked.stages(std):
            outcomes.append(run_stage(name, recipe, source, settings, config=config, std=std))
            source = outcomes[-1].manifest
    return outcomes


def encode_held_out(
    recipe: Recipe, sources: Mapping[str | None, ArchiveRef | str], settings: RunSettings
) -> list[Outcome]:
    """Encode the held-out images on which training measures its loss, if it does.

    Not again if they are there: they belong to the tars, which a forced pipeline has made anew.
    """
    latents = Manifest.read(str(sources["encode"]))
    encoding = recipe.encoding_held_out(latents, settings.root, force=settings.force)
    if encoding is None:
        there = recipe.held_out([Manifest.read(str(sources["shard"]))], settings.root)
        return [Outcome(ENCODE_HELD_OUT, "skipped", 0.0, there.url)] if there else []
    given = encoding.form("encode") | {STAGES["encode"].role: sources["shard"]}
    settings = settings.model_copy(update={"force": False})
    outcome = run_flow("encode", given, settings, of=recipe.pipeline_id, which=f" {HELD_OUT}")
    return [replace(outcome, name=ENCODE_HELD_OUT)]


def _chosen(recipe: Recipe, trained: str, outcomes: list[Outcome]) -> str:
    """The manifest of the best model over training, to sample, evaluate and register."""
    model = recipe.chosen(CheckpointManifest.read(trained), evaluations_of(outcomes))
    said = "the model of step %s is sampled and registered (registry.checkpoint: best)"
    get_run_logger().info(said, f"{model.counts['steps']:,}")
    return model.url
