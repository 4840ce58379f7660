"""The pipeline: images become tars, latents, a checkpoint, samples, metrics, and a model version."""

from collections.abc import Mapping
from dataclasses import asdict, replace

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from dit.export import CheckpointManifest
from flows import processes
from flows.contract import ENCODE_HELD_OUT, STAGES, Outcome
from flows.milestones import evaluate_milestones
from flows.over_training import evaluations_of
from flows.over_widths import OverWidths
from flows.perform import RunSettings
from flows.plan.preflight import preflight
from flows.recipe import Recipe
from flows.report.page import Shown, publish
from flows.stages import HERE, run_flow, run_stage
from flows.tracking import runs
from storage.archives.open import HELD_OUT, ArchiveRef
from storage.manifest import Manifest
from storage.patience import patient


@flow(flow_run_name="{recipe.name}")
def pipeline(recipe: Recipe, settings: RunSettings = HERE) -> list[Outcome]:
    """Check that every stage can run, and run them in turn. Finished stages are skipped.

    Milestones and averages of several widths are evaluated after training, if the recipe asks for it.
    """
    processes.note(flow_run.id, settings.root)
    settings = settings.model_copy(update={"pipeline_id": recipe.pipeline_id})
    outcomes: list[Outcome] = []
    sources: dict[str | None, ArchiveRef | str] = {None: recipe.archive}
    with patient(settings.patience):
        preflight(recipe, settings.root, force=settings.force)
        with runs.pipeline_run(recipe.pipeline_id, settings.root) as run_id:
            for name in recipe.stages:
                if name == "train":
                    outcomes += encode_held_out(recipe, sources, settings)
                outcome = run_stage(name, recipe, sources[STAGES[name].reads], settings)
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
            publish(Shown.of(recipe.name, outcomes, settings.root), run_id)
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
    outcome = run_flow("encode", given, settings.model_copy(update={"force": False}), which=f" {HELD_OUT}")
    return [replace(outcome, name=ENCODE_HELD_OUT)]


def _chosen(recipe: Recipe, trained: str, outcomes: list[Outcome]) -> str:
    """The manifest of the best model over training, to sample, evaluate and register."""
    model = recipe.chosen(CheckpointManifest.read(trained), evaluations_of(outcomes))
    said = "the model of step %s is sampled and registered (registry.checkpoint: best)"
    get_run_logger().info(said, f"{model.counts['steps']:,}")
    return model.url
