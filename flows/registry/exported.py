"""Checks the files of a registered model where MLflow keeps them."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from dit.evaluate import MetricsManifest
from dit.export import MODEL, SAMPLING, CheckpointManifest, weights_file
from dit.sample import SampleManifest
from dit.samplers.guide import NAME as GUIDE
from flows.registry.config import ModelManifest
from flows.tracking.runs import tracking_uri
from storage import uri
from storage.errors import DitflowError, one_line
from storage.manifest import MANIFEST, OTHER_BYTES
from storage.seal import BrokenSealError, opened

REMEDY = "register again with --force"


def export_faults(url: str) -> list[str]:
    """What is wrong with the files of a version in the registry, one line each.

    The files of the model and its guide are compared with the training outputs that the version was made from, and
    those of the autoencoder with the hashes that were registered.

    Args:
        url: the output of the stage ``register``.
    """
    version = ModelManifest.read(url)
    where = f"{version.model_name} {version.model_version}"
    try:
        evaluated = "metrics" in version.parents
        made = version.parent("metrics", MetricsManifest) if evaluated else version
        samples = made.parent("samples", SampleManifest)
        models = {"model": samples.parent("checkpoint", CheckpointManifest)}
        if GUIDE in samples.parents:
            models[GUIDE] = samples.parent(GUIDE, CheckpointManifest)
        store = tracking_uri(version.root)
        source = MlflowClient(store).get_model_version_download_uri(version.model_name, str(version.model_version))
        with tempfile.TemporaryDirectory(prefix="ditflow-") as copies:
            place = None if source.startswith(("file:", "/")) else copies
            folder = Path(download_artifacts(source, dst_path=place, tracking_uri=store))
            return [f"{where}: {fault}; {REMEDY}" for fault in _faults(folder / "artifacts", models)]
    except Exception as error:  # MLflow documents no exception types
        text = str(error) if isinstance(error, DitflowError) else one_line(error)
        return [f"{where}: cannot be checked: {text}"]


def _faults(folder: Path, models: Mapping[str, CheckpointManifest]) -> Iterator[str]:
    for name, checkpoint in models.items():
        if CheckpointManifest.read(str(folder / name)).content != checkpoint.content:
            yield f"{folder / name / MANIFEST}: not that of {uri.redact(checkpoint.uri)}"
    sampling = folder / "model" / SAMPLING
    try:
        values = json.loads(opened(sampling.read_bytes()))
    except BrokenSealError:
        yield f"{sampling}: {OTHER_BYTES}"
        return
    expected = {folder / "vae" / name: sha256 for name, sha256 in values["vae"].items()}
    for name, weights in {"model": "weights", GUIDE: "guide_weights"}.items():
        hashes = {entry.path: entry.sha256 for entry in models[name].files} if name in models else {}
        files = (MODEL, weights_file(values["sampling"][weights])) if hashes else ()
        expected |= {folder / name / file: hashes[file] for file in files}
    yield from (f"{path}: {OTHER_BYTES}" for path, sha256 in expected.items() if uri.file_sha256(str(path)) != sha256)
