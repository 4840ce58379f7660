"""The runs in MLflow: one for each output of a stage, below one for each pipeline.

Runs are found by their tags. That of an output has ``ditflow.digest``, so a stage that was killed, failed or restarted
continues its own run; that of a pipeline has ``ditflow.pipeline_id``, so a stage that is run alone joins it. The tag
``ditflow.manifest`` leads from a run to the output. A stage works on without MLflow: `sync_run` sends later what
MLflow has missed, and creates the run if there is none. Runs that a kill left open are ended by `sync_pipeline` behind
finished work, and by `end_killed`, which knows them by the tag ``ditflow.process`` (`flows.processes`).
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

from dit.average import AverageManifest
from dit.export import CheckpointManifest
from flows import processes
from flows.servers import given_address, local_home
from flows.tracking import database
from flows.tracking.models import finish
from flows.tracking.sink import UNSENT, BestEffort, complaint, log_file, log_records, read_unsent
from flows.tracking.spec import TrackingSpec
from flows.tracking.store import (
    DIGEST_TAG,
    MANIFEST_TAG,
    MILESTONE,
    PROCESS_TAG,
    create,
    end,
    find,
    find_or_create_pipeline,
    find_pipeline,
    is_finished,
    log_params,
    stage_tags,
    tagged,
    tell_pipeline,
)
from storage import uri
from storage.errors import DitflowError, InputError, SubmittedError, one_line
from storage.header import Header
from storage.manifest import MANIFEST, Manifest, StageOutput, output_folder
from storage.manifest import is_finished as finished

LOGGER = logging.getLogger(__name__)
EXPERIMENT = database.EXPERIMENT
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment of model training. The pages of MLflow 3.17 do not read it: see `TRAINING_VIEW`."""
TRAINING_VIEW = "?workflowType=machine_learning"
"""Behind the address of a page: MLflow shows it as model training, not as GenAI."""
MODELS = "models:/"
"""What references to registered models begin with."""


def tracking_uri(root: str) -> str:
    """``MLFLOW_TRACKING_URI``, else a sqlite file in the root, or in ``runs`` here if the root is remote.

    Raises:
        InputError: the variable contains a login.
    """
    return given_address("MLFLOW_TRACKING_URI") or database.address(local_home(root))


def open_client(root: str) -> tuple[MlflowClient, str]:
    """A client of a root's tracking store, and the id of the experiment ``ditflow``.

    Raises:
        InputError: the database is half-made, or the experiment was deleted.
        MlflowException: MLflow does not answer.
    """
    home, where, location = local_home(root), tracking_uri(root), None
    if where == database.address(home):
        database.create(home)
    if where.startswith("sqlite"):
        location = database.artifacts(home)
    client = MlflowClient(where)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None and experiment.lifecycle_stage == LifecycleStage.DELETED:
        where, number = uri.redact(where), experiment.experiment_id
        restore = f"MLFLOW_TRACKING_URI={where} mlflow experiments restore --experiment-id {number}"
        raise InputError(f"{where}: the experiment {EXPERIMENT!r} was deleted; restore it with `{restore}`")
    if experiment is not None:
        return client, str(experiment.experiment_id)
    try:
        return client, str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=KIND))
    except MlflowException as error:
        if not _is(error, RESOURCE_ALREADY_EXISTS):
            raise
        return client, str(client.get_experiment_by_name(EXPERIMENT).experiment_id)  # another process has created it


def prepare(root: str) -> None:
    """Create the tracking store if there is none, which takes seconds. An error is only logged."""
    with BestEffort():
        open_client(root)


@contextmanager
def mlflow_errors(root: str) -> Iterator[None]:
    """Turn MLflow's errors in the block into our own, with one line each.

    Raises:
        InputError: there is no such run, model or version.
        DitflowError: MLflow does not answer, or refuses.
    """
    where = uri.redact(tracking_uri(root))
    try:
        yield
    except MlflowException as error:
        if _is(error, RESOURCE_DOES_NOT_EXIST):
            raise InputError(f"{where}: {one_line(error)}; name one that exists, or make it first") from error
        raise DitflowError(f"{where}: {complaint(error)} ({one_line(error)})") from error


def resolve(reference: str, root: str) -> str:
    """The manifest URL of a reference, which is a URL already, the id of an MLflow run, or a registered model's.

    A model is ``models:/name@alias`` or ``models:/name/version``, and its manifest that of its training.

    Raises:
        InputError: run, model or version is unknown, or there is no manifest.
        DitflowError: MLflow does not answer.
    """
    if reference.startswith(MODELS):
        return _training_of(reference, root)
    if not re.fullmatch(r"[0-9a-f]{32}", reference):
        return reference
    with mlflow_errors(root):
        client, _ = open_client(root)
        url: str | None = client.get_run(reference).data.tags.get(MANIFEST_TAG)
    if url is None:
        raise InputError(f"MLflow run {reference}: not that of a finished stage; name one that has a manifest")
    return url


def _training_of(reference: str, root: str) -> str:
    """The manifest URL of the training of a registered model: in this root if it is there, else where it was made."""
    found = re.fullmatch(rf"{MODELS}([^/]+)(?:@([^/@]+)|/([0-9]+))", reference)
    if found is None:
        raise InputError(f"{reference}: write {MODELS}name@alias or {MODELS}name/version")
    name, alias, version = found.groups()
    with mlflow_errors(root):
        client, _ = open_client(root)
        aliases = {} if version else client.get_registered_model(name).aliases
        if not version and alias not in aliases:
            raise InputError(f"{reference}: {name} has no alias {alias}; it has {', '.join(aliases) or 'none'}")
        tags = client.get_model_version(name, str(version or aliases[alias])).tags
    digest = tags.get("digest.checkpoint", "")
    noted: str = tags.get(MANIFEST_TAG, "")
    folders = (CheckpointManifest.folder(root, digest), AverageManifest.folder(root, digest))
    places = (*(uri.join(folder, MANIFEST) for folder in folders), noted)
    place = next((place for place in places if place and finished(output_folder(place))), None)
    if place is None:
        raise InputError(f"{reference}: its training is no longer at {noted or 'any place'}")
    return place


def pipeline_run_id(pipeline_id: str, root: str) -> str | None:
    """The id of a pipeline's run; None if there is none or MLflow does not answer."""
    with BestEffort():
        client, experiment_id = open_client(root)
        return find_pipeline(client, experiment_id, pipeline_id)
    return None


def run_url(run_id: str, root: str) -> str | None:
    """The web page of a run; None if the tracking store is not a server or does not answer."""
    address = tracking_uri(root)
    if address.startswith("http"):
        with BestEffort():
            _, experiment_id = open_client(root)
            return f"{uri.redact(address)}/#/experiments/{experiment_id}/runs/{run_id}{TRAINING_VIEW}"
    return None


def experiment_url(root: str, server: str | None = None) -> str | None:
    """The web page of all runs, in the view for training, of a server or that in use. None as for `run_url`."""
    address = server or tracking_uri(root)
    if address.startswith("http"):
        with BestEffort():
            _, experiment_id = open_client(root)
            return f"{uri.redact(address)}/#/experiments/{experiment_id}/runs{TRAINING_VIEW}"
    return None


@contextmanager
def stage_run(output: StageOutput, root: str, *, here: bool = True) -> Iterator[tuple[StageOutput, TrackingSpec]]:
    """Open the MLflow run of a stage for the length of the block, and end it as finished, failed or killed.

    An output has one run for all attempts. Without MLflow the stage works without a run, and its records are kept
    beside the manifest until `sync_run`.

    Args:
        output: what the stage makes.
        root: folder of all outputs.
        here: whether its work ends with this process, unlike that of a Slurm job.

    Yields:
        The output with the run's id in its provenance, and the run for rank 0 to write.

    Raises:
        InputError: the experiment was deleted.
    """
    run_id, spec = _open_run(output, root, processes.join(root) if here else "")
    if run_id is None:
        yield output, spec
        return
    client = MlflowClient(spec.uri)
    with _end_on_error(client, run_id):
        yield output.made_by(mlflow_run_id=run_id), spec
    with BestEffort():
        finish(client, run_id, Manifest.read(output.uri))


def skip_recorded(spec: TrackingSpec, output: StageOutput) -> TrackingSpec:
    """The same run, with the steps to skip that earlier attempts have recorded."""
    last = _last_unsent(output)
    with BestEffort():
        if spec.run_id is not None:
            last = max([last, *_last_steps(MlflowClient(spec.uri), spec.run_id).values()])
    return spec.model_copy(update={"skip_to": max(last, spec.skip_to)})


@contextmanager
def pipeline_run(
    pipeline_id: str, root: str, name: str | None = None, params: Mapping[str, Any] | None = None
) -> Iterator[str | None]:
    """Open the run of a pipeline for the length of the block; yields its id, None if MLflow does not answer.

    Args:
        pipeline_id: the same for all attempts.
        root: folder of all outputs.
        name: of the run, if it is not to keep the one that it has; that of a new one is the id.
        params: nested values; a run keeps those of its first attempt.

    Raises:
        InputError: the experiment was deleted.
    """
    run_id = None
    with BestEffort(InputError):
        client, experiment_id = open_client(root)
        process = processes.join(root)
        run_id = find_or_create_pipeline(client, experiment_id, pipeline_id, process)
        client.set_tag(run_id, PROCESS_TAG, process)
        client.update_run(run_id, status="RUNNING", name=name)
        log_params(client, run_id, params or {})
    if run_id is None:
        yield None
        return
    with _end_on_error(client, run_id):
        yield run_id
    with BestEffort():
        end(client, run_id, "FINISHED")


def sync_run(manifest: Manifest, root: str) -> None:
    """Send what MLflow has missed of a finished stage, and end its run; do nothing if nothing is missing.

    A stage that had no run at all gets one now. Its manifest, which is never changed, does not name it. A run that a
    person deleted stays so.
    """
    with BestEffort():
        _sync(*open_client(root), manifest)


def sync_pipeline(pipeline_id: str, stages: Sequence[Manifest], root: str, further: Iterable[Manifest] = ()) -> None:
    """`sync_run` for every stage of a finished pipeline, whose own run gets their numbers and is ended if it is open.

    Args:
        pipeline_id: of the recipe.
        stages: what the pipeline's own stages have made.
        root: folder of all outputs.
        further: what was made beside them, to evaluate other models.
    """
    with BestEffort():
        client, experiment_id = open_client(root)
        everything = (*further, *stages)
        for manifest in everything:
            _sync(client, experiment_id, manifest)
        run_id = find_pipeline(client, experiment_id, pipeline_id)
        if run_id is not None and not is_finished(client.get_run(run_id)):
            tell_pipeline(client, run_id, stages, everything)
            end(client, run_id, "FINISHED")


def end_killed(names: Iterable[str], root: str) -> None:
    """End the runs of killed processes, whose names `flows.processes` has given. Raises what MLflow raises."""
    client, experiment_id = open_client(root)
    for name in names:
        selector = f"attributes.status = 'RUNNING' and {tagged(PROCESS_TAG, name)}"
        for run in client.search_runs([experiment_id], selector):
            end(client, run.info.run_id, "KILLED")


@contextmanager
def _end_on_error(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Mark a run as failed or killed if the block raises, unless its work goes on elsewhere."""
    try:
        yield
    except SubmittedError:
        raise
    except BaseException as error:
        with BestEffort():
            end(client, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise


def _open_run(output: StageOutput, root: str, process: str) -> tuple[str | None, TrackingSpec]:
    """Find or create the run of an output, and send what earlier attempts could not send."""
    address = tracking_uri(root)
    with BestEffort(InputError):
        client, experiment_id = open_client(root)
        run_id = _reopen(client, experiment_id, output.header, process)
        run_id = run_id or create(client, experiment_id, output.header, process)
        _send_unsent(client, run_id, output.uri, lambda path: uri.read(output.url(path)))
        skip_to = max(_last_steps(client, run_id).values(), default=-1)
        return run_id, TrackingSpec(uri=address, run_id=run_id, skip_to=skip_to)
    return None, TrackingSpec(uri=address, run_id=None, skip_to=_last_unsent(output))


def _reopen(client: MlflowClient, experiment_id: str, header: Header, process: str) -> str | None:
    run_id = find(client, experiment_id, DIGEST_TAG, header.digest, "attributes.status != 'FINISHED'")
    if run_id is not None:
        tags = stage_tags(client, experiment_id, header) | {PROCESS_TAG: process}
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        client.update_run(run_id, status="RUNNING")
    return run_id


def _sync(client: MlflowClient, experiment_id: str, manifest: Manifest) -> None:
    run_id = manifest.provenance.mlflow_run_id or find(client, experiment_id, DIGEST_TAG, manifest.digest)
    run_id = run_id or create(client, experiment_id, manifest)
    run = living_run(client, run_id)
    if run is None:
        return
    _send_unsent(client, run_id, manifest.uri, manifest.read_object)
    if not is_finished(run):
        finish(client, run_id, manifest)


def living_run(client: MlflowClient, run_id: str) -> Run | None:
    """A run; None if a person has deleted it, or it is in another store. Raises what MLflow raises."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if _is(error, RESOURCE_DOES_NOT_EXIST):  # or it was removed for good
            return None
        raise
    return None if run.info.lifecycle_stage == LifecycleStage.DELETED else run


def _send_unsent(client: MlflowClient, run_id: str, folder: str, read: Callable[[str], bytes]) -> None:
    """Send the records of a folder's `UNSENT` file that the run lacks, and remove the file. ``read`` reads a path."""
    unsent = uri.join(folder, UNSENT)
    if not uri.exists(unsent):
        return
    metrics, names = read_unsent(unsent)
    last = _last_steps(client, run_id)
    log_records(client, run_id, [metric for metric in metrics if metric.step > last.get(metric.key, -1)])
    for name in names:
        log_file(client, run_id, name, read(f"artifacts/{name}"))
    uri.remove_tree(unsent, folder)


def _last_unsent(output: StageOutput) -> int:
    """The last step among the unsent metrics, or -1."""
    url = output.url(UNSENT)
    return max((metric.step for metric in read_unsent(url)[0]), default=-1) if uri.exists(url) else -1


def _last_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """The last recorded step of each metric of a run, except for those that others log about its milestones."""
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith(MILESTONE)]
    return {key: max(metric.step for metric in client.get_metric_history(run_id, key)) for key in keys}


def _is(error: MlflowException, code: int) -> bool:
    return bool(error.error_code == ErrorCode.Name(code))
