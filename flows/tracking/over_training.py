"""The metrics of milestones in the MLflow run of their training, with the training step as the step.

They are named ``milestone_fd`` and so on. A second way of evaluating the same milestones gets names of its own, since a
run's metrics cannot be replaced: ``milestone_<8 hex digits>_fd``.
"""

from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from dit.evaluate import MetricsManifest
from dit.metrics.comparison import NFE
from flows.tracking.runs import living_run, open_client
from flows.tracking.sink import BestEffort, log_records
from flows.tracking.store import DIGEST_TAG, MILESTONE, find, find_pipeline
from storage.header import Header
from storage.seal import json_digest

WAY_TAG = "ditflow.milestones"
ENDED_EARLY = ("FAILED", "KILLED")
BEST_TAG = "ditflow.best_milestone"


def log(training: Header, evaluations: Mapping[int, MetricsManifest], root: str) -> None:
    """Log the metrics of milestones that the run of their training lacks.

    Without MLflow, or without such a run, a warning or nothing; the next pipeline of the recipe logs them.

    Args:
        training: header of the output of the training, finished or not.
        evaluations: the metrics by training step, all measured in the same way.
        root: folder or URL of all outputs.
    """
    with BestEffort():
        client, experiment_id = open_client(root)
        run_id = training.provenance.mlflow_run_id or find(client, experiment_id, DIGEST_TAG, training.digest)
        run = None if run_id is None else living_run(client, run_id)
        if run is not None and evaluations:
            _log(client, run, evaluations)


def early_end(pipeline_id: str, training: Header | None, root: str) -> str | None:
    """What has ended early, and how: the training or, if that has no run yet, its pipeline; FAILED or KILLED.

    None if it goes on, there is no such run, or MLflow does not answer. Also if it is FINISHED, as the same training in
    another root may be.

    Args:
        pipeline_id: of the recipe.
        training: header of the output of the training; None if its inputs are not there yet.
        root: folder or URL of all outputs.
    """
    with BestEffort():
        client, experiment_id = open_client(root)
        what, run_id = "training", None
        if training is not None:
            run_id = training.provenance.mlflow_run_id or find(client, experiment_id, DIGEST_TAG, training.digest)
        if run_id is None:
            what, run_id = "pipeline", find_pipeline(client, experiment_id, pipeline_id)
        run = None if run_id is None else living_run(client, run_id)
        return None if run is None or run.info.status not in ENDED_EARLY else f"{what} has ended ({run.info.status})"
    return None


def _log(client: MlflowClient, run: Run, evaluations: Mapping[int, MetricsManifest]) -> None:
    run_id, first = str(run.info.run_id), next(iter(evaluations.values()))
    prefix = _prefix(client, run, first)
    name = prefix + first.metric
    there = {metric.step for metric in client.get_metric_history(run_id, name)}
    for step, each in evaluations.items():
        if step not in there:
            when = int(each.created.timestamp() * 1000)  # so that two workers send the same records
            values = [Metric(prefix + key, value, when, step) for key, value in each.metrics.items()]
            log_records(client, run_id, values)
    if prefix == MILESTONE:
        best = min(client.get_metric_history(run_id, name), key=lambda metric: (metric.value, metric.step))
        client.set_tag(run_id, BEST_TAG, f"step {best.step:,}: {first.distance} {best.value:.4g}")


def _prefix(client: MlflowClient, run: Run, evaluation: MetricsManifest) -> str:
    """What the names of the metrics begin with; the first way of evaluation takes the plain one."""
    conditions = {key: value for key, value in evaluation.conditions.items() if key not in {"training_steps", NFE}}
    way = json_digest({"distance": evaluation.distance, **conditions})
    first = run.data.tags.get(WAY_TAG)
    if first is None:
        client.set_tag(run.info.run_id, WAY_TAG, way)
    return MILESTONE if first in (None, way) else f"{MILESTONE}{way[:8]}_"
