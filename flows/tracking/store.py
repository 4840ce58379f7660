"""Runs in MLflow's store: how they are found, and what is written into them.

Which of several runs is meant, and when a run ends, never depends on the order of clocks, which can be set back.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from flows.tracking.sink import log_file
from storage import uri
from storage.header import Header
from storage.manifest import MANIFEST, Manifest

MANIFEST_TAG = "ditflow.manifest"
DIGEST_TAG = "ditflow.digest"
PIPELINE_TAG = "ditflow.pipeline_id"
STAGE_TAG = "ditflow.stage"
PROCESS_TAG = "ditflow.process"
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
    client.log_batch(run_id, params=[Param(key, value) for key, value in flatten(header.config).items()])
    sources = {name: header.parents[name].uri if name in header.parents else name for name in header.inputs}
    inputs = [_dataset(name, digest, sources[name], "input") for name, digest in header.inputs.items()]
    client.log_inputs(run_id, datasets=inputs)
    return run_id


def stage_tags(client: MlflowClient, experiment_id: str, header: Header) -> dict[str, str]:
    """The tags of an output's run; that of its pipeline is created if there is none."""
    provenance = header.provenance
    tags = {MLFLOW_RUN_NAME: provenance.name or header.stage, STAGE_TAG: header.stage, DIGEST_TAG: header.digest}
    if provenance.pipeline_id is not None:
        tags[PIPELINE_TAG] = provenance.pipeline_id
        tags[MLFLOW_PARENT_RUN_ID] = find_or_create_pipeline(client, experiment_id, provenance.pipeline_id)
    if provenance.prefect_flow_run_id is not None:
        tags["prefect.flow_run_id"] = provenance.prefect_flow_run_id
    if provenance.prefect_flow_run_url is not None:
        tags["prefect.flow_run_url"] = provenance.prefect_flow_run_url
        tags[MLFLOW_RUN_NOTE] = f"[Prefect flow run]({provenance.prefect_flow_run_url})"
    return tags


def _dataset(name: str, digest: str, source: str, context: str) -> DatasetInput:
    """An input or output as an MLflow dataset. MLflow keeps 36 characters of a digest; the tag has all 64."""
    tags = [InputTag("mlflow.data.context", context), InputTag("digest", digest)]
    source = json.dumps({"uri": source})
    return DatasetInput(Dataset(name=name, digest=digest[:32], source_type="ditflow", source=source), tags)


def is_finished(run: Run) -> bool:
    """Whether a run ended well."""
    return bool(run.info.status == "FINISHED")


def end(client: MlflowClient, run_id: str, status: str) -> None:
    """End a run, not before it began: the clock may have been set back meanwhile."""
    began = client.get_run(run_id).info.start_time
    client.set_terminated(run_id, status, max(began, int(time.time() * 1000)))


def finish(client: MlflowClient, run_id: str, manifest: Manifest) -> None:
    """Log the manifest of a finished stage to its run, with what the run lacks of it; tag the run and end it."""
    log_file(client, run_id, MANIFEST, uri.read(manifest.url))
    _log_pictures(client, run_id, manifest)
    now, known = int(time.time() * 1000), client.get_run(run_id).data.metrics
    numbers = {**manifest.metrics, **{f"count.{key}": float(value) for key, value in manifest.counts.items()}}
    metrics = [Metric(key, value, now, 0) for key, value in numbers.items() if key not in known]
    tags = [RunTag(MANIFEST_TAG, uri.redact(manifest.url)), RunTag("ditflow.code_version", manifest.code_version)]
    client.log_batch(run_id, metrics=metrics, tags=tags)
    made = _dataset(manifest.stage, manifest.digest, uri.redact(manifest.uri), "output")
    client.log_inputs(run_id, datasets=[made])
    end(client, run_id, "FINISHED")


def _log_pictures(client: MlflowClient, run_id: str, manifest: Manifest) -> None:
    """Log the files for people that a killed attempt has written, and had no time to send."""
    sent = {entry.path for entry in client.list_artifacts(run_id)}
    for entry in manifest.files:
        folder, _, name = entry.path.rpartition("/")
        if folder == "artifacts" and name not in sent:
            log_file(client, run_id, name, manifest.read_object(entry.path))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as MLflow params: dotted keys and string values."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
