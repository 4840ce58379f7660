"""The evaluation of milestones: by the pipeline after training, or by another worker while training goes on.

Each milestone is sampled and evaluated by the stages of these names, so what is done is skipped, and a kill costs no
more than the block of samples that was being drawn.
"""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from flows import processes
from flows.contract import STAGES, Outcome
from flows.names import named
from flows.over_training import OverTraining
from flows.perform import RunSettings
from flows.recipe import Recipe
from flows.refusing import RefusingFlow
from flows.settle import settle
from flows.stages import HERE, run_stage
from flows.tracking import over_training, runs
from flows.tracking.references import located
from storage.archives.once import listed_once
from storage.errors import DitflowError
from storage.header import Header
from storage.latents import LatentManifest
from storage.manifest import Manifest
from storage.patience import patient

POLL_SECONDS = 10.0


@RefusingFlow
def milestones(recipe: Recipe, settings: RunSettings = HERE) -> list[Outcome]:
    """Evaluate the milestones of a recipe while another process trains it, up to the last step.

    Waits for shards, latents and milestones that are not there yet.

    Raises:
        DitflowError: training, or the pipeline before it, has ended early.
    """
    asked = recipe.asked_over_training()
    processes.note(flow_run.id, settings.root)
    named(f"{recipe.pipeline_id} milestones")
    pipeline = recipe.pipeline_id if runs.pipeline_run_id(recipe.pipeline_id, settings.root) else None
    settings = settings.model_copy(update={"pipeline_id": pipeline})
    with patient(settings.patience):
        return _follow(recipe, asked, _latents(recipe, settings.root), settings)


def evaluate_milestones(recipe: Recipe, latents: str, trained: str, settings: RunSettings) -> list[Outcome]:
    """Evaluate the milestones of a finished training run, and its last step, in the recipe's way.

    Args:
        recipe: the recipe, which asks for it.
        latents: URL of the manifest that it trained on.
        trained: URL of the manifest of its last step.
        settings: of the run.

    Returns:
        The outcomes of the stages in the order of the steps.
    """
    asked, last = recipe.asked_over_training(), CheckpointManifest.read(trained)
    models = asked.checkpoints(settings.root, LatentManifest.read(latents)) | {recipe.train.steps: last}
    missing = [step for step in asked.steps if step not in models]
    if missing:
        get_run_logger().warning(
            "not evaluated, since training went past them before they were asked for: steps %s", missing
        )
    points = _Points(recipe, asked, last, settings)
    for step in sorted(models):
        points.add(step, models[step])
    return points.outcomes


def _latents(recipe: Recipe, root: str) -> Manifest:
    """Wait for what the recipe trains on.

    Raises:
        DitflowError: the pipeline has ended before that.
    """
    with listed_once():
        while True:
            settle(root, alone=False)  # so that the run of a killed command has ended, too
            end = over_training.early_end(recipe.pipeline_id, None, root)
            made = recipe.finished(root, before="train")
            if made is not None:
                return made[-1]
            if end is not None:
                raise _ended(recipe, end, "training")
            get_run_logger().info("waiting for the latents of %s", recipe.name)
            _wait()


def _follow(recipe: Recipe, asked: OverTraining, latents: Manifest, settings: RunSettings) -> list[Outcome]:
    """Evaluate what training commits, until a look after that at its last step finds nothing new.

    Raises:
        DitflowError: training, or the pipeline before it, has ended early.
    """
    training = STAGES["train"].output(settings.root, located(recipe.train, settings.root), latents).header
    points, waiting = _Points(recipe, asked, training, settings), False
    while True:
        settle(settings.root, alone=False)
        end = over_training.early_end(recipe.pipeline_id, points.training, settings.root)
        models = asked.checkpoints(settings.root, latents)  # after it: what training has committed before its end
        points.training = models.get(recipe.train.steps, points.training)  # which names its MLflow run
        new = sorted(models.keys() - points.metrics.keys())
        for step in new:
            points.add(step, models[step])
        if not new and recipe.train.steps in points.metrics:
            return sorted(points.outcomes, key=lambda outcome: outcome.step or 0)
        missing = sorted({*asked.steps} - points.metrics.keys())
        if not new and end is not None:
            raise _ended(recipe, end, f"the steps {missing}")
        if not new and not waiting:
            get_run_logger().info("waiting for the next of the steps %s", missing)
        if not new:
            _wait()
        waiting = not new


def _wait() -> None:
    """Wait a little, unless that keeps others from the only place of a work pool, such as the training itself.

    Raises:
        DitflowError: it does.
    """
    context = FlowRunContext.get()
    pool = context.flow_run.work_pool_name if context and context.flow_run else None
    if pool is not None:
        with get_client(sync_client=True) as client:
            due = FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
                next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=datetime.now(UTC)),
            )
            of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
            if client.read_work_pool(pool).concurrency_limit == 1 and (
                others := client.read_flow_runs(flow_run_filter=due, work_pool_filter=of_pool, limit=1)
            ):
                gives = f"milestones: gives its place in the work pool {pool} to {others[0].name}"
                raise DitflowError(f"{gives}; raise the limit of the pool from 1, or run `ditflow milestones`")
    time.sleep(POLL_SECONDS)


def _ended(recipe: Recipe, end: str, before: str) -> DitflowError:
    return DitflowError(f"milestones: {recipe.name}: {end} before {before}; start it again, then this command")


@dataclass
class _Points:
    """The steps of a training run that are evaluated so far."""

    recipe: Recipe
    asked: OverTraining
    training: Header
    settings: RunSettings
    outcomes: list[Outcome] = field(default_factory=list)
    metrics: dict[int, MetricsManifest] = field(default_factory=dict)

    def add(self, step: int, model: Manifest) -> None:
        """Sample and evaluate the model of a step, and log what the MLflow run of the training lacks."""
        recipe, settings = self.recipe, self.settings
        sampled = run_stage("sample", recipe, model.url, settings, config=self.asked.sample, step=step)
        evaluated = run_stage("evaluate", recipe, sampled.manifest, settings, config=self.asked.evaluate, step=step)
        self.outcomes += [sampled, evaluated]
        self.metrics[step] = MetricsManifest.read(evaluated.manifest)
        over_training.log(self.training, self.metrics, settings.root)
