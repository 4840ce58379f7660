"""Checks the files of a registered model where MLflow keeps them."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from dit.evaluate import MetricsManifest
from dit.export import MODEL, SAMPLING, CheckpointManifest, weights_file
from dit.sample import SampleManifest
from flows.registry.config import ModelManifest
from flows.tracking.runs import tracking_uri
from storage import uri
from storage.errors import DitflowError, one_line
from storage.manifest import MANIFEST, OTHER_BYTES
from storage.seal import BrokenSealError, opened

REMEDY = "register again with --force"


def export_faults(url: str) -> list[str]:
    """What is wrong with the files of a version in the registry, one line each.

    The model's files are compared with the training output that the version was made from, and those of the
    autoencoder with the hashes that were registered.

    Args:
        url: the output of the stage ``register``.
    """
    version = ModelManifest.read(url)
    where = f"{version.model_name} {version.model_version}"
    try:
        samples = version.parent("metrics", MetricsManifest).parent("samples", SampleManifest)
        checkpoint = samples.parent("checkpoint", CheckpointManifest)
        store = tracking_uri(version.root)
        source = MlflowClient(store).get_model_version_download_uri(version.model_name, str(version.model_version))
        with tempfile.TemporaryDirectory(prefix="ditflow-") as copies:
            place = None if source.startswith(("file:", "/")) else copies
            folder = Path(download_artifacts(source, dst_path=place, tracking_uri=store))
            return [f"{where}: {fault}; {REMEDY}" for fault in _faults(folder / "artifacts", checkpoint)]
    except Exception as error:  # MLflow documents no exception types
        text = str(error) if isinstance(error, DitflowError) else one_line(error)
        return [f"{where}: cannot be checked: {text}"]


def _faults(folder: Path, checkpoint: CheckpointManifest) -> Iterator[str]:
    model = folder / "model"
    if CheckpointManifest.read(str(model)).content != checkpoint.content:
        yield f"{model / MANIFEST}: not that of {uri.redact(checkpoint.uri)}"
    try:
        values = json.loads(opened((model / SAMPLING).read_bytes()))
    except BrokenSealError:
        yield f"{model / SAMPLING}: {OTHER_BYTES}"
        return
    hashes = {entry.path: entry.sha256 for entry in checkpoint.files}
    expected = {model / name: hashes[name] for name in (MODEL, weights_file(values["sampling"]["weights"]))}
    expected |= {folder / "vae" / name: sha256 for name, sha256 in values["vae"].items()}
    yield from (f"{path}: {OTHER_BYTES}" for path, sha256 in expected.items() if uri.file_sha256(str(path)) != sha256)
