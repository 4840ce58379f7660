"""The stage ``register``: a version in the MLflow registry with the model, its metrics and its lineage.

The model is a pyfunc (`flows.registry.model`) with the exported weights, the autoencoder, and the code of `dit` and
`storage`. The version is found by the tag ``ditflow.digest``, so a stage that was killed does not register it twice.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.utils import validation
from packaging.requirements import Requirement

from dit.evaluate import MetricsManifest
from dit.export import MODEL, SAMPLING, CheckpointManifest, weights_file
from dit.sample import PICTURE, SampleManifest
from dit.samplers.config import SampleConfig
from dit.samplers.guide import NAME as GUIDE
from dit.training.held_out import LOSS as HELD_OUT_LOSS
from dit.training.held_out import REPORT as HELD_OUT_REPORT
from dit.vae import VaeRef, fetch, packages
from flows.registry.card import card
from flows.registry.config import VERSION, ModelManifest, RegisterConfig
from flows.registry.events import emit
from flows.registry.promotion import EVALUATION_TAG, Evaluation, apply_rule
from flows.tracking.models import dataset, plain
from flows.tracking.runs import tracking_uri
from flows.tracking.store import DIGEST_TAG, MANIFEST_TAG, tagged
from storage import uri
from storage.code_version import code_version
from storage.errors import DitflowError, InputError
from storage.estimate import PlanContext
from storage.manifest import MANIFEST, StageOutput
from storage.seal import sealed
from storage.shards.shard import ShardManifest
from storage.stage import StageDefinition
from storage.tracker import Tracker, publish

REGISTERED = "ditflow.model.registered"
"""The Prefect event of a new version; its resource is ``ditflow.model.<name>``."""
FLOWS_ALONE = {"apprise", "argcomplete", "fastapi", "httpx", "nvidia-ml-py", "prefect", "rich"}
"""Packages that `flows` needs, and a served model does not."""
REEVALUATE_LABEL = "ditflow.reevaluate"
"""Label of that event's resource, ``true`` or ``false``: whether prefect.yaml's trigger starts a reevaluation."""
METRICS_DIGEST_TAG = "digest.metrics"
CONTENT_TAG = "content.metrics"


def run(
    config: RegisterConfig, source: MetricsManifest | SampleManifest, *, out: StageOutput, tracker: Tracker
) -> ModelManifest:
    """Register the model that the metrics belong to as a new version, or without metrics that of the samples.

    After a kill between the version and the manifest, the next run finds the version. It emits the event again.

    Raises:
        DitflowError: MLflow has no run for this stage, because it did not answer when the stage started.
        InputError: a stage that the metrics come from is gone.
    """
    run_id, store = out.header.provenance.mlflow_run_id, tracking_uri(out.root)
    if run_id is None:
        problem = (
            "does not answer; start it" if store.startswith("http") else "cannot be used; the log says why. Mend it"
        )
        raise DitflowError(f"register: {uri.redact(store)}, which holds the registry, {problem} and run register again")
    samples = source if isinstance(source, SampleManifest) else source.parent("samples", SampleManifest)
    checkpoint = samples.parent("checkpoint", CheckpointManifest)
    metrics = _metrics(source, checkpoint)
    client = MlflowClient(store)
    number = _registered(client, config.model_name, out)
    if number is None:
        tags = {
            DIGEST_TAG: out.header.digest,
            CONTENT_TAG: source.content,
            **_numbers(source, metrics),
            **_lineage(source, samples, checkpoint),
        }
        with _fluent(store):
            name = out.header.provenance.name or "model"
            model_uri = _log(checkpoint, samples, metrics, run_id, name)
            made = mlflow.register_model(model_uri, config.model_name, tags=tags).version
        number = _registered(client, config.model_name, out) or int(made)
        if number != int(made):  # another run of the same pipeline was first
            client.delete_model_version(config.model_name, made)
    text = card(config.model_name, number, samples, checkpoint, metrics, source.conditions, run_id)
    client.update_model_version(config.model_name, str(number), text)
    client.set_registered_model_alias(config.model_name, config.alias, str(number))
    about = {"version": number, "alias": config.alias, "digest": out.header.digest}
    emit(REGISTERED, config.model_name, about, labels={REEVALUATE_LABEL: str(config.reevaluate).lower()})
    promotion = None
    if config.promote == "automatic":
        promotion = apply_rule(client, config.model_name, number, config.rule)
    tracker.progress(1, 1, "versions")
    return out.commit(
        ModelManifest,
        [publish(out, tracker, PICTURE, samples.read_object(f"artifacts/{PICTURE}"))],
        metrics=metrics,
        model_name=config.model_name,
        model_version=number,
        alias=config.alias,
        promotion=promotion,
    )


def check(config: RegisterConfig, _: MetricsManifest | SampleManifest, __: PlanContext) -> None:
    """Check the names by MLflow's own rules.

    Raises:
        InputError: MLflow refuses one of them.
    """
    rules = {
        "model_name": (validation._validate_model_name,),
        "alias": (validation._validate_model_alias_name, validation._validate_model_alias_name_reserved),
    }
    for name, validators in rules.items():
        for validate in validators:
            try:
                validate(getattr(config, name))
            except MlflowException as error:
                raise InputError(f"registry.{name}: MLflow refuses it: {error.message}") from error


def _registered(client: MlflowClient, name: str, out: StageOutput) -> int | None:
    """The version that was registered for an output, from the same bytes of the metrics."""
    (content,) = out.header.contents.values()
    tags = f"{tagged(DIGEST_TAG, out.header.digest)} and {tagged(CONTENT_TAG, content)}"
    versions = client.search_model_versions(f'name = "{name}" and {tags}')
    return min((int(version.version) for version in versions), default=None)


def _metrics(source: MetricsManifest | SampleManifest, checkpoint: CheckpointManifest) -> dict[str, float]:
    """Those of the evaluation; without one, the loss on held-out images if it was measured."""
    if isinstance(source, MetricsManifest):
        return source.metrics
    path = f"artifacts/{HELD_OUT_REPORT}"
    if path not in {entry.path for entry in checkpoint.files}:
        return {}
    last = [{}, *json.loads(checkpoint.read_object(path))["points"]][-1]
    return {name: last[name] for name in (HELD_OUT_LOSS, f"{HELD_OUT_LOSS}_se") if name in last}


def _numbers(source: MetricsManifest | SampleManifest, metrics: Mapping[str, float]) -> dict[str, str]:
    """Tags with the metrics: one for each, to read, and one with an evaluation for `promotion.evaluation`."""
    tags = {f"metric.{key}": f"{value:.6g}" for key, value in metrics.items()}
    if isinstance(source, SampleManifest):
        return tags
    whole = Evaluation(distance=source.distance, metrics=source.metrics, conditions=source.conditions)
    return tags | {"distance": source.distance, EVALUATION_TAG: whole.model_dump_json()}


def _lineage(
    source: MetricsManifest | SampleManifest, samples: SampleManifest, checkpoint: CheckpointManifest
) -> dict[str, str]:
    """Tags with the digests of every output from the archive to the metrics, and the URL of the checkpoint."""
    others, latents = _guide(samples), checkpoint.latents()
    if checkpoint.stage != CheckpointManifest.STAGE:
        others["training"] = checkpoint.parent("checkpoint", CheckpointManifest)
    shards = latents.parent("shards", ShardManifest)
    metrics = {"metrics": source} if isinstance(source, MetricsManifest) else {}
    made = {**metrics, "samples": samples, "checkpoint": checkpoint, "latents": latents, "shards": shards}
    digests = {f"digest.{name}": manifest.digest for name, manifest in (made | others).items()}
    digests |= {f"digest.archive.{split}": digest for split, digest in shards.inputs.items()}
    return digests | {MANIFEST_TAG: uri.redact(checkpoint.url), "ditflow.code_version": code_version()}


def _log(
    checkpoint: CheckpointManifest, samples: SampleManifest, metrics: Mapping[str, float], run_id: str, name: str
) -> str:
    """Log the model under a name to the stage's run, with its metrics and code, and return its URI."""
    sampling = SampleConfig.model_validate(samples.config)
    with tempfile.TemporaryDirectory() as folder, _current(run_id):
        logged = mlflow.pyfunc.log_model(
            name=plain(name),
            python_model=str(Path(__file__).with_name("model.py")),
            artifacts=_artifacts(Path(folder), checkpoint, _guide(samples).get(GUIDE), sampling),
            signature=_signature(sampling),
            input_example=(pd.DataFrame({"label": np.array([0], np.int64)}), {"steps": min(sampling.steps, 4)}),
            pip_requirements=_requirements(sampling.vae or checkpoint.card.vae_ref),
            code_paths=[str(Path(__file__).parents[2] / package) for package in ("dit", "storage")],
        )
        about = dataset("shards", checkpoint.latents().parent("shards", ShardManifest))
        now = int(time.time() * 1000)
        linked = [Metric(key, value, now, 0, model_id=logged.model_id, **about) for key, value in metrics.items()]
        MlflowClient().log_batch(run_id, metrics=linked)
    return str(logged.model_uri)


def _requirements(vae: VaeRef | None) -> list[str]:
    """The packages that dit, storage and the autoencoder need, pinned to the versions installed here."""
    needed = {Requirement(text).name for text in requires("ditflow") or () if "extra ==" not in text}
    needed |= set(packages(vae) if vae else [])
    return sorted(f"{name}=={version(name).partition('+')[0]}" for name in needed - FLOWS_ALONE)


@contextmanager
def _fluent(store: str) -> Iterator[None]:
    """Let MLflow's fluent functions, which take no client, use a store for the length of the block."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(store)  # also sets the variable, which would outlive the block
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # removes the variable
        if given is not None:
            os.environ["MLFLOW_TRACKING_URI"] = given


@contextmanager
def _current(run_id: str) -> Iterator[None]:
    """Make a run the active one of MLflow's fluent functions. It stays open: the committed stage ends it."""
    mlflow.start_run(run_id=run_id, nested=True)
    try:
        yield
    finally:
        mlflow.end_run("RUNNING")


def _guide(samples: SampleManifest) -> dict[str, CheckpointManifest]:
    """The model that guided the samples, by its name; none if the model was not guided by another one."""
    return {GUIDE: samples.parent(GUIDE, CheckpointManifest)} if GUIDE in samples.parents else {}


def _artifacts(
    folder: Path, checkpoint: CheckpointManifest, guide: CheckpointManifest | None, sampling: SampleConfig
) -> dict[str, str]:
    """Folders with the model and its sampling config, with its guide and its autoencoder if it has them.

    All can be compared.
    """
    model, vae = folder / "model", folder / "vae"
    _write_model(model, checkpoint, sampling.weights)
    if guide:
        _write_model(folder / GUIDE, guide, sampling.guide_weights)
    ref = sampling.vae or checkpoint.card.vae_ref
    hashes = fetch(ref, vae) if ref else {}
    values = {"sampling": sampling.model_dump(mode="json", exclude={"vae", "guide"}), "vae": hashes}
    (model / SAMPLING).write_bytes(sealed(json.dumps(values, indent=1).encode()))
    folders = {"model": model} | ({GUIDE: folder / GUIDE} if guide else {}) | ({"vae": vae} if ref else {})
    return {name: str(place) for name, place in folders.items()}


def _write_model(folder: Path, checkpoint: CheckpointManifest, weights: str) -> None:
    folder.mkdir()
    for name in (MODEL, weights_file(weights)):
        (folder / name).write_bytes(checkpoint.read_object(name))
    (folder / MANIFEST).write_bytes(uri.read(checkpoint.url))  # last: it is what the others are compared with


def _signature(sampling: SampleConfig) -> ModelSignature:
    """Labels in, PNG images out; the defaults of the params are those of the evaluated samples."""
    params: list[tuple[str, str, Any]] = [
        ("seed", "long", sampling.seed),
        ("steps", "long", sampling.steps),
        ("guidance_scale", "double", sampling.guidance_scale),
        ("guidance_channels", "string", sampling.guidance_channels),
        ("sampler", "string", sampling.sampler),
    ]
    return ModelSignature(
        inputs=Schema([ColSpec("long", "label", required=False), ColSpec("string", "class", required=False)]),
        outputs=Schema([ColSpec("string", "png_base64")]),
        params=ParamSchema([ParamSpec(name, kind, default) for name, kind, default in params]),
    )


DEFINITION = StageDefinition(RegisterConfig, ModelManifest, VERSION, run, check=check)
