"""Runs in MLflow's store: how they are found, and what is written into them.

Which of several runs is meant, and when a run ends, never depends on the order of clocks, which can be set back.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from flows.tracking.notes import cost_metrics, headline, pipeline_note, stage_note
from flows.tracking.sink import log_file
from storage import uri
from storage.config import flatten
from storage.header import Header
from storage.manifest import MANIFEST, Manifest

MANIFEST_TAG = "ditflow.manifest"
DIGEST_TAG = "ditflow.digest"
PIPELINE_TAG = "ditflow.pipeline_id"
STAGE_TAG = "ditflow.stage"
PROCESS_TAG = "ditflow.process"
DIGEST_LENGTH = 32
"""Characters of a dataset's digest; MLflow keeps 36."""
PARAMS = 100
"""The most params that MLflow takes in one call."""
MILESTONE = "milestone_"
"""What the names of a milestone's metrics begin with in the run of its training."""


def tagged(tag: str, value: str) -> str:
    """MLflow's search expression for a value of a tag, which may hold single quotes, but no double ones."""
    return f'tags.`{tag}` = "{value}"'


def find(client: MlflowClient, experiment_id: str, tag: str, value: str, also: str = "") -> str | None:
    """The run with a tag; of several one that is not finished, and always the same."""
    selector = tagged(tag, value) + (f" and {also}" if also else "")
    runs = client.search_runs([experiment_id], selector)
    return min(((is_finished(run), str(run.info.run_id)) for run in runs), default=(True, None))[1]


def find_pipeline(client: MlflowClient, experiment_id: str, pipeline_id: str) -> str | None:
    """The run of a pipeline."""
    return find(client, experiment_id, PIPELINE_TAG, pipeline_id, tagged(STAGE_TAG, "pipeline"))


def find_or_create_pipeline(client: MlflowClient, experiment_id: str, pipeline_id: str, process: str = "") -> str:
    """The run of a pipeline; a new one belongs to a process of `flows.processes`, or to none."""
    run_id = find_pipeline(client, experiment_id, pipeline_id)
    if run_id is not None:
        return run_id
    tags = {MLFLOW_RUN_NAME: pipeline_id, PIPELINE_TAG: pipeline_id, STAGE_TAG: "pipeline", PROCESS_TAG: process}
    return str(client.create_run(experiment_id, tags=tags).info.run_id)


def create(client: MlflowClient, experiment_id: str, header: Header, process: str = "") -> str:
    """A new run of an output, which belongs to a process of `flows.processes`, or to none."""
    tags = stage_tags(client, experiment_id, header) | {PROCESS_TAG: process}
    run_id = str(client.create_run(experiment_id, tags=tags).info.run_id)
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flatten(header.config).items()])
    sources = {name: header.parents[name].uri if name in header.parents else name for name in header.inputs}
    inputs = [_dataset(name, digest, sources[name], "input") for name, digest in header.inputs.items()]
    client.log_inputs(run_id, datasets=inputs)
    return run_id


def stage_tags(client: MlflowClient, experiment_id: str, header: Header) -> dict[str, str]:
    """The tags of an output's run; that of its pipeline is created if there is none."""
    provenance = header.provenance
    tags = {MLFLOW_RUN_NAME: provenance.name or header.stage, STAGE_TAG: header.stage, DIGEST_TAG: header.digest}
    tags[MLFLOW_RUN_NOTE] = stage_note(header)
    if provenance.pipeline_id is not None:
        tags[PIPELINE_TAG] = provenance.pipeline_id
        tags[MLFLOW_PARENT_RUN_ID] = find_or_create_pipeline(client, experiment_id, provenance.pipeline_id)
    if provenance.prefect_flow_run_id is not None:
        tags["prefect.flow_run_id"] = provenance.prefect_flow_run_id
    if provenance.prefect_flow_run_url is not None:
        tags["prefect.flow_run_url"] = provenance.prefect_flow_run_url
    return tags


def _dataset(name: str, digest: str, source: str, context: str) -> DatasetInput:
    """An input or output as an MLflow dataset. MLflow keeps 36 characters of a digest; the tag has all 64."""
    tags = [InputTag("mlflow.data.context", context), InputTag("digest", digest)]
    source = json.dumps({"uri": source})
    return DatasetInput(Dataset(name=name, digest=digest[:DIGEST_LENGTH], source_type="ditflow", source=source), tags)


def is_finished(run: Run) -> bool:
    """Whether a run ended well."""
    return bool(run.info.status == "FINISHED")


def end(client: MlflowClient, run_id: str, status: str) -> None:
    """End a run, not before it began: the clock may have been set back meanwhile."""
    began = client.get_run(run_id).info.start_time
    client.set_terminated(run_id, status, max(began, int(time.time() * 1000)))


def finish(client: MlflowClient, run_id: str, manifest: Manifest, about: Mapping[str, str]) -> None:
    """Log the manifest of a finished stage to its run, with what the run lacks of it; tag the run and end it.

    Args:
        client: of the tracking store.
        run_id: the run.
        manifest: what the stage has made.
        about: model and dataset that its metrics are about, see `flows.tracking.models.about`.
    """
    log_file(client, run_id, MANIFEST, uri.read(manifest.url))
    _log_pictures(client, run_id, manifest)
    now, known = int(time.time() * 1000), client.get_run(run_id).data.metrics
    numbers = {f"count.{key}": float(value) for key, value in manifest.counts.items()}
    numbers |= cost_metrics([manifest.cost] if manifest.cost else [])
    metrics = [
        _again(client, run_id, key, about) if key in known else Metric(key, value, now, 0, **about)
        for key, value in manifest.metrics.items()
        if about or key not in known
    ]
    metrics += [Metric(key, value, now, 0) for key, value in numbers.items() if key not in known]
    tags = [RunTag(MANIFEST_TAG, uri.redact(manifest.url)), RunTag("ditflow.code_version", manifest.code_version)]
    tags.append(RunTag(MLFLOW_RUN_NOTE, stage_note(manifest, manifest)))
    client.log_batch(run_id, metrics=metrics, tags=tags)
    made = _dataset(manifest.stage, manifest.digest, uri.redact(manifest.uri), "output")
    client.log_inputs(run_id, datasets=[made])
    end(client, run_id, "FINISHED")


def _again(client: MlflowClient, run_id: str, key: str, about: Mapping[str, str]) -> Metric:
    """The metric that a run has, now with what it is about. It is the same record, so the run has it once."""
    last = client.get_metric_history(run_id, key)[-1]
    return Metric(key, last.value, last.timestamp, last.step, **about)


def tell_pipeline(
    client: MlflowClient, run_id: str, stages: Sequence[Manifest], everything: Sequence[Manifest]
) -> None:
    """Log the numbers of a finished pipeline to its run, with what it has made in words, and the cost of everything."""
    now, known = int(time.time() * 1000), client.get_run(run_id).data.metrics
    numbers = headline(stages) | cost_metrics([made.cost for made in everything if made.cost])
    metrics = [Metric(key, value, now, 0) for key, value in numbers.items() if known.get(key) != value]
    client.log_batch(run_id, metrics=metrics, tags=[RunTag(MLFLOW_RUN_NOTE, pipeline_note(stages))])


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    """Log nested values as params; those that the run has stay as they are."""
    known = client.get_run(run_id).data.params
    params = [Param(key, str(value)) for key, value in flatten(values).items() if key not in known]
    for start in range(0, len(params), PARAMS):
        client.log_batch(run_id, params=params[start : start + PARAMS])


def _log_pictures(client: MlflowClient, run_id: str, manifest: Manifest) -> None:
    """Log the files for people that a killed attempt has written, and had no time to send."""
    sent = {entry.path for entry in client.list_artifacts(run_id)}
    for entry in manifest.files:
        folder, _, name = entry.path.rpartition("/")
        if folder == "artifacts" and name not in sent:
            log_file(client, run_id, name, manifest.read_object(entry.path))
