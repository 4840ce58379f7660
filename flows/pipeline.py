"""The whole story: images become tars, latents, a checkpoint, samples, numbers, and a model version."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State

from flows import stages
from flows.contract import STAGES, Outcome
from flows.perform import SKIPPED, RunSettings
from flows.recipe import Recipe
from flows.report.page import publish
from flows.tracking import runs
from storage.archives.open import ArchiveRef
from storage.manifest import Manifest


@flow(flow_run_name="{recipe.name}")
def pipeline(recipe: Recipe, settings: RunSettings = stages.HERE) -> list[Outcome]:
    """Every stage of a recipe, one after the other; those that are done are skipped."""
    settings = settings.model_copy(update={"pipeline_id": recipe.pipeline_id})
    outcomes: list[Outcome] = []

    def step(stage: Callable[..., State[str]], *arguments: Any) -> str:
        outcomes.append(_outcome(stage, *arguments, settings=settings))
        return outcomes[-1].manifest

    with runs.pipeline_run(recipe.pipeline_id, settings.root) as run_id:
        shards = step(stages.shard, recipe.archive, recipe.shard)
        latents = step(stages.encode, shards, recipe.encode, recipe.launch)
        checkpoint = step(stages.train, latents, recipe.train, recipe.launch)
        samples = step(stages.sample, checkpoint, recipe.sample, recipe.launch)
        if recipe.evaluate:
            metrics = step(stages.evaluate, samples, recipe.evaluate, recipe.launch)
            step(stages.register, metrics, recipe.registry)
        publish(recipe.name, [Manifest.read(outcome.manifest) for outcome in outcomes], settings.root, run_id)
    create_table_artifact([asdict(outcome) for outcome in outcomes], key="pipeline-stages", description=recipe.name)
    return outcomes


def run_stage(name: str, recipe: Recipe, source: ArchiveRef | str, settings: RunSettings) -> Outcome:
    """One stage of a recipe, on any earlier output."""
    launcher = [recipe.launch] if STAGES[name].ranked else []
    return _outcome(getattr(stages, name), source, recipe.config_of(name), *launcher, settings=settings)


def _outcome(stage: Any, *arguments: Any, settings: RunSettings) -> Outcome:
    begin = time.monotonic()
    state = stage(*arguments, settings=settings, return_state=True)
    url = state.result()
    name: Literal["ran", "skipped"] = "skipped" if state.name == SKIPPED else "ran"
    return Outcome(stage.name, name, round(time.monotonic() - begin, 1), url)
