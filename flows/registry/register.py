"""A checkpoint to a model version in the MLflow registry."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any
from uuid import UUID

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from packaging.requirements import Requirement

from dit.evaluate import MetricsManifest
from dit.export import MODEL, CheckpointManifest, weights_file
from dit.sample import PICTURE, SampleConfig, SampleManifest
from dit.vae import fetch
from flows.registry.config import VERSION, ModelManifest, RegisterConfig
from flows.registry.promotion import EVALUATION_TAG, Evaluation, consider
from flows.tracking.runs import DIGEST_TAG, MANIFEST_TAG, tracking_uri
from storage import uri
from storage.code_version import code_version
from storage.errors import DitflowError
from storage.latents import LatentManifest
from storage.manifest import StageOutput
from storage.shards.shard import ShardManifest
from storage.stage import StageDefinition
from storage.tracker import Tracker, publish

REGISTERED = "ditflow.model.registered"
"""The event of a new version. What it concerns is the model, ``ditflow.model.<name>``."""
METRICS_DIGEST_TAG = "digest.metrics"


def run(config: RegisterConfig, metrics: MetricsManifest, *, out: StageOutput, tracker: Tracker) -> ModelManifest:
    """Register the model behind some metrics as a new version, with its numbers and lineage.

    A kill between the version and the manifest leaves the version, which the next run finds again. The
    event is emitted as the version takes its alias; one that was killed emits it once more.

    Raises:
        DitflowError: MLflow has no run for this stage, so it was away when the stage began.
        InputError: the stages behind the metrics are gone.
    """
    run_id = out.header.provenance.mlflow_run_id
    if run_id is None:
        raise DitflowError(
            "register: the MLflow server is away and the registry with it; start it and run register again"
        )
    samples = metrics.parent("samples", SampleManifest)
    checkpoint = samples.parent("checkpoint", CheckpointManifest)
    store = tracking_uri(out.root)
    client = MlflowClient(store)
    number = _registered(client, config.model_name, out.header.digest)
    if number is None:
        tags = {DIGEST_TAG: out.header.digest, **_numbers(metrics), **_lineage(metrics, samples, checkpoint)}
        with _fluent(store):
            model_uri = _log(checkpoint, samples, metrics, run_id)
            made = mlflow.register_model(model_uri, config.model_name, tags=tags).version
        number = _registered(client, config.model_name, out.header.digest) or int(made)
        if number != int(made):  # another machine that runs the same pipeline was first
            client.delete_model_version(config.model_name, made)
    client.set_registered_model_alias(config.model_name, config.alias, str(number))
    emit(REGISTERED, config.model_name, {"version": number, "alias": config.alias, "digest": out.header.digest})
    promotion = None
    if config.promote == "automatic":
        promotion = consider(client, config.model_name, number, config.rule)
    tracker.progress(1, 1, "versions")
    return out.commit(
        ModelManifest,
        [publish(out, tracker, PICTURE, samples.read_object(f"artifacts/{PICTURE}"))],
        metrics=metrics.metrics,
        model_name=config.model_name,
        model_version=number,
        alias=config.alias,
        promotion=promotion,
    )


def emit(event: str, model_name: str, payload: dict[str, Any], once: UUID | None = None) -> None:
    """Tell Prefect, in the background, of something that happened to a model; of the same ``once`` only once."""
    from prefect.events import emit_event  # Prefect reads its settings when it is imported, and recipes come before

    resource = {"prefect.resource.id": f"ditflow.model.{model_name}", "prefect.resource.name": model_name}
    emit_event(event, resource, payload={"model_name": model_name} | payload, id=once)


def _registered(client: MlflowClient, name: str, digest: str) -> int | None:
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
    return min((int(version.version) for version in found), default=None)


def _numbers(metrics: MetricsManifest) -> dict[str, str]:
    """The metrics for people, and all of it for `promotion.evaluation`."""
    tags = {f"metric.{key}": f"{value:.6g}" for key, value in metrics.metrics.items()}
    whole = Evaluation(distance=metrics.distance, metrics=metrics.metrics, conditions=metrics.conditions)
    return tags | {"distance": metrics.distance, EVALUATION_TAG: whole.model_dump_json()}


def _lineage(metrics: MetricsManifest, samples: SampleManifest, checkpoint: CheckpointManifest) -> dict[str, str]:
    """The digests of everything between the images and the numbers, and where the checkpoint lies."""
    latents = checkpoint.parent("latents", LatentManifest)
    shards = latents.parent("shards", ShardManifest)
    made = {"metrics": metrics, "samples": samples, "checkpoint": checkpoint, "latents": latents, "shards": shards}
    digests = {f"digest.{name}": manifest.digest for name, manifest in made.items()}
    digests |= {f"digest.archive.{split}": digest for split, digest in shards.inputs.items()}
    return digests | {MANIFEST_TAG: uri.redact(checkpoint.url), "ditflow.code_version": code_version()}


def _log(checkpoint: CheckpointManifest, samples: SampleManifest, metrics: MetricsManifest, run_id: str) -> str:
    """Log the model to the stage's run, with its numbers and the code that it needs, and return its URI."""
    drawn = SampleConfig.model_validate(samples.config)
    with tempfile.TemporaryDirectory() as folder, _current(run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("model.py")),
            artifacts=_artifacts(Path(folder), checkpoint, drawn),
            signature=_signature(drawn),
            input_example=(pd.DataFrame({"label": np.array([0], np.int64)}), {"steps": min(drawn.steps, 4)}),
            pip_requirements=_requirements(),
            code_paths=[str(Path(__file__).parents[2] / package) for package in ("dit", "storage")],
        )
        mlflow.log_metrics(metrics.metrics, model_id=logged.model_id)
    return str(logged.model_uri)


def _requirements() -> list[str]:
    """The packages that dit and storage need, in the versions that are installed here."""
    needed = {Requirement(text).name for text in requires("ditflow") or () if "extra ==" not in text}
    return sorted(f"{name}=={version(name).partition('+')[0]}" for name in needed - {"prefect", "fastapi"})


@contextmanager
def _fluent(store: str) -> Iterator[None]:
    """Have those of MLflow's functions that take no client use a store, within the block alone."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(store)  # sets the variable too, which every later run of this process would follow
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # which removes it
        if given is not None:
            os.environ["MLFLOW_TRACKING_URI"] = given


@contextmanager
def _current(run_id: str) -> Iterator[None]:
    """Make a run MLflow's current one; it is still open afterwards, since only a committed stage ends its run."""
    mlflow.start_run(run_id=run_id, nested=True)
    try:
        yield
    finally:
        mlflow.end_run("RUNNING")


def _artifacts(folder: Path, checkpoint: CheckpointManifest, drawn: SampleConfig) -> dict[str, str]:
    """The model, how it was sampled, and the autoencoder if it has one."""
    model, vae = folder / "model", folder / "vae"
    model.mkdir()
    (model / "sample.json").write_text(drawn.model_dump_json(exclude={"vae"}))
    for name in (MODEL, weights_file(drawn.weights)):
        (model / name).write_bytes(uri.read(uri.join(checkpoint.uri, name)))
    ref = drawn.vae or checkpoint.card.vae_ref
    if ref is None:
        return {"model": str(model)}
    fetch(ref, vae)
    return {"model": str(model), "vae": str(vae)}


def _signature(drawn: SampleConfig) -> ModelSignature:
    """Labels in, PNG images out; the params default to how the evaluated samples were drawn."""
    params: list[tuple[str, str, Any]] = [
        ("seed", "long", drawn.seed),
        ("steps", "long", drawn.steps),
        ("guidance_scale", "double", drawn.guidance_scale),
        ("guidance_channels", "string", drawn.guidance_channels),
        ("sampler", "string", drawn.sampler),
    ]
    return ModelSignature(
        inputs=Schema([ColSpec("long", "label")]),
        outputs=Schema([ColSpec("string", "png_base64")]),
        params=ParamSchema([ParamSpec(name, kind, default) for name, kind, default in params]),
    )


DEFINITION = StageDefinition(RegisterConfig, ModelManifest, VERSION, run)
