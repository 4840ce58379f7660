"""Trained models in MLflow, one for each training and average, and what the metrics of a stage are about.

MLflow compares models by metrics that name a model and a dataset. A model here has no files in MLflow: its tag
``ditflow.manifest`` leads to them.
"""

import logging
import re
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelInput, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.sample import SampleManifest
from flows.tracking.sink import REFUSES, complaint
from flows.tracking.store import DIGEST_LENGTH, DIGEST_TAG, MANIFEST_TAG, PARAMS
from flows.tracking.store import finish as end
from storage import uri
from storage.config import flatten
from storage.errors import DitflowError, one_line
from storage.manifest import Manifest
from storage.shards.shard import ShardManifest

LOGGER = logging.getLogger(__name__)
TRAINED = (CheckpointManifest.STAGE, *CheckpointManifest.ALSO)
_LENGTH = 500  # the most characters that MLflow takes of a model's param


def finish(client: MlflowClient, run_id: str, manifest: Manifest) -> None:
    """`flows.tracking.store.finish` with metrics that name model and dataset, if MLflow takes them so. Raises as it."""
    named: dict[str, str] = {}
    try:
        named = about(client, client.get_run(run_id), manifest)
    except (DitflowError, MlflowException) as error:
        if isinstance(error, MlflowException) and complaint(error) != REFUSES:
            raise  # it is away, and would not take the rest either
        LOGGER.warning("the metrics of %s name no model in MLflow: %s", manifest.stage, one_line(error))
    end(client, run_id, manifest, named)


def about(client: MlflowClient, run: Run, manifest: Manifest) -> dict[str, str]:
    """What the metrics of a finished stage are about, as MLflow's `Metric` takes it; empty for most stages.

    Those of a training are of its model on its latents, and those of an evaluation of the model on the shards that hold
    the images of reference. The run gets the model as its output or input.

    Raises:
        DitflowError: what the stage was made from is gone.
        MlflowException: MLflow does not answer, or refuses.
    """
    experiment_id, run_id = run.info.experiment_id, run.info.run_id
    if manifest.stage in TRAINED:
        trained = CheckpointManifest.read(manifest.uri)
        model_id = _model(client, experiment_id, trained, run_id)
        if not run.outputs or model_id not in [each.model_id for each in run.outputs.model_outputs]:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, trained.counts.get("steps", 0))])
        return {"model_id": model_id, **dataset("latents", trained.latents())}
    if manifest.stage == MetricsManifest.STAGE:
        trained = manifest.parent("samples", SampleManifest).parent("checkpoint", CheckpointManifest)
        model_id = _model(client, experiment_id, trained, trained.provenance.mlflow_run_id)
        client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
        return {"model_id": model_id, **dataset("shards", trained.latents().parent("shards", ShardManifest))}
    return {}


def dataset(name: str, manifest: Manifest) -> dict[str, str]:
    """An output as the dataset of metrics, under the name that it has among the inputs of runs."""
    return {"dataset_name": name, "dataset_digest": manifest.digest[:DIGEST_LENGTH]}


def plain(name: str) -> str:
    """A name as MLflow takes it of a model."""
    return re.sub(r"[/:.%\"']", "-", name)


def _model(client: MlflowClient, experiment_id: str, trained: CheckpointManifest, run_id: str | None) -> str:
    """The model of a training; it is created if there is none, and finalized if a kill has left it."""
    found = client.search_logged_models([experiment_id], f"tags.`{DIGEST_TAG}` = '{trained.digest}'", max_results=1)
    model = next(iter(found), None) or _created(client, experiment_id, trained, run_id)
    if model.status != LoggedModelStatus.READY:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_id)


def _created(client: MlflowClient, experiment_id: str, trained: CheckpointManifest, run_id: str | None) -> LoggedModel:
    values: dict[str, Any] = flatten(trained.config)
    return client.create_logged_model(
        experiment_id,
        plain(trained.provenance.name or f"{trained.stage} {trained.folder_name}"),
        run_id,
        tags={
            MLFLOW_MODEL_IS_EXTERNAL: "true",
            DIGEST_TAG: trained.digest,
            MANIFEST_TAG: uri.redact(trained.url),
        },
        params={key: str(value)[:_LENGTH] for key, value in list(values.items())[:PARAMS]},
        model_type=values.get("model.kind"),
    )
