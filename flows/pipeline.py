"""The pipeline: images become tars, latents, a checkpoint, samples, metrics, and a model version."""

import time
from collections.abc import Mapping
from dataclasses import asdict

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from flows import processes
from flows.contract import STAGES, Outcome
from flows.perform import SKIPPED, RunSettings
from flows.plan.preflight import preflight
from flows.recipe import Recipe
from flows.report.page import publish
from flows.stages import HERE, stage_flow
from flows.tracking import runs
from storage.archives.open import ArchiveRef
from storage.manifest import Manifest
from storage.patience import patient


@flow(flow_run_name="{recipe.name}")
def pipeline(recipe: Recipe, settings: RunSettings = HERE) -> list[Outcome]:
    """Check that every stage can run, and run them in turn. Finished stages are skipped."""
    processes.note(flow_run.id, settings.root)
    settings = settings.model_copy(update={"pipeline_id": recipe.pipeline_id})
    outcomes: dict[str, Outcome] = {}
    with patient(settings.patience):
        preflight(recipe, settings.root, force=settings.force)
        with runs.pipeline_run(recipe.pipeline_id, settings.root) as run_id:
            for name in recipe.stages:
                before = STAGES[name].reads
                source = outcomes[before].manifest if before else recipe.archive
                if name == "train":
                    encode_held_out(recipe, outcomes, settings)
                outcomes[name] = run_stage(name, recipe, source, settings)
            manifests = [Manifest.read(outcome.manifest) for outcome in outcomes.values()]
            publish(recipe.name, manifests, settings.root, run_id)
    done = list(outcomes.values())
    create_table_artifact([asdict(outcome) for outcome in done], key="pipeline-stages", description=recipe.name)
    return done


def encode_held_out(recipe: Recipe, outcomes: Mapping[str, Outcome], settings: RunSettings) -> None:
    """Encode the held-out images on which training measures its loss, if it does.

    Not again if they are there: they belong to the tars, which a forced pipeline has made anew.
    """
    latents = Manifest.read(outcomes["encode"].manifest)
    encoding = recipe.encoding_held_out(latents, settings.root, force=settings.force)
    if encoding is not None:
        run_stage("encode", encoding, outcomes["shard"].manifest, settings.model_copy(update={"force": False}))


def run_stage(name: str, recipe: Recipe, source: ArchiveRef | str, settings: RunSettings) -> Outcome:
    """Run one stage of a recipe on any earlier output."""
    begin = time.monotonic()
    given = recipe.form(name) | {STAGES[name].role: source}
    state = stage_flow(name)(**given, settings=settings, return_state=True)
    skipped = state.name == SKIPPED
    return Outcome(name, "skipped" if skipped else "ran", round(time.monotonic() - begin, 1), state.result())
