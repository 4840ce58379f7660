"""The report of a pipeline run: one HTML file with everything in it, and nothing in it that runs."""

import base64
import logging
from collections.abc import Iterable, Sequence
from html import escape

from mlflow import MlflowClient

from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.neighbours import Neighbours, neighbours
from dit.sample import SampleManifest
from flows import runs
from flows.tracking import log_file, one_line
from storage import uri
from storage.manifest import Manifest
from storage.tracking import NullTracker

LOGGER = logging.getLogger(__name__)
FOLDER, REPORT = "reports", "report.html"
SHOWN, NEAREST = 8, 5
CAPTIONS = {
    "images.png": "Images to train on, as they came",
    "reconstructions.png": "What the autoencoder makes of them",
    "loss.png": "Training loss",
    "samples.png": "Samples; with few classes one in each column",
}
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
img { max-width: 100%; min-width: min(100%, 24rem); image-rendering: pixelated }
figure { margin: 1rem 0 } figcaption { color: #555 } .lead { font-size: 1.3rem }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums } code { font-size: .85em; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e4e4e4 } figcaption { color: #aaa } td, th { border-color: #3a3d44 }
}
</style>
"""


def place(manifests: Sequence[Manifest], root: str) -> str:
    """The URL of the report of some stages, which is named after the last."""
    return uri.join(uri.absolute(root), FOLDER, f"{manifests[-1].digest[:16]}.html")


def write_page(name: str, manifests: Sequence[Manifest], root: str) -> str:
    """Write the report of a pipeline's stages, in their order, and return its URL; one that is there is kept.

    Raises:
        InputError: a stage's output is gone, or the extractor cannot be loaded.
        StorageError: a picture is not what was committed, or the disk is full.
    """
    url = place(manifests, root)
    if not uri.exists(url):
        uri.write(url, page(name, manifests, root).encode())
    return url


def publish(name: str, manifests: Sequence[Manifest], root: str, run_id: str | None) -> None:
    """Write the report and log it to the pipeline's MLflow run, if there is one.

    The stages are committed: a report that cannot be made is told and must not fail them.
    """
    try:
        url = write_page(name, manifests, root)
        if run_id is not None:
            log_file(MlflowClient(runs.tracking_uri(root)), run_id, REPORT, uri.read(url))
    except Exception as error:
        LOGGER.warning("no report: %s", one_line(error))


def page(name: str, manifests: Sequence[Manifest], root: str) -> str:
    """The report as HTML: the same bytes for the same manifests. Errors as `write_page`."""
    judged = [MetricsManifest.read(found.uri) for found in manifests if found.stage == MetricsManifest.STAGE]
    parts = [HEAD, f"<title>{escape(name)}</title></head><body><h1>{escape(name)}</h1>"]
    parts += [_lead(found) for found in judged]
    parts += ["<h2>Pictures</h2>", *(_picture(found) for found in manifests)]
    for found in judged:
        parts += [_numbers(found), _nearest(found, root)]
    return "\n".join([*parts, _lineage(manifests), "</body></html>\n"])


def _lead(found: MetricsManifest) -> str:
    metric = found.distance.partition("[")[0].lower()
    value, low, high = (found.metrics[f"{metric}{end}"] for end in ("", "_low", "_high"))
    count = found.counts["samples"]
    text = f"{found.distance} {value:.4g} ({low:.4g} to {high:.4g}) from {count:,} samples"
    return f'<p class="lead">{escape(text)}</p>'


def _picture(found: Manifest) -> str:
    names = [entry.path for entry in found.files if entry.path.startswith("artifacts/") and entry.path.endswith(".png")]
    if found.stage == "register":  # its picture is that of the samples
        return ""
    return "\n".join(_figure(found.read_object(path), _caption(path.rpartition("/")[2])) for path in names)


def _caption(name: str) -> str:
    return CAPTIONS.get(name, name)


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _numbers(found: MetricsManifest) -> str:
    metrics = _table([(name, f"{value:.6g}") for name, value in found.metrics.items()], ("metric", "value"))
    counts = _table([(name, f"{value:,}") for name, value in found.counts.items()], ("images", "count"))
    conditions = _table([(name, str(value)) for name, value in found.conditions.items()], ("condition", "value"))
    return f"<h2>Metrics</h2>{metrics}{counts}<h2>Conditions</h2>{conditions}"


def _nearest(found: MetricsManifest, root: str) -> str:
    samples = found.parent("samples", SampleManifest)
    config = EvaluateConfig.model_validate(found.config)
    near = neighbours(config, samples, root=root, count=SHOWN, nearest=NEAREST, tracker=NullTracker())
    caption = f"A sample in each row, then the nearest of {near.among:,} training images in feature space"
    return f"<h2>Does it repeat what it has seen?</h2>{_figure(near.picture, caption)}{_distances(near)}"


def _distances(near: Neighbours) -> str:
    rows = [(f"sample {row}", *(f"{value:.4g}" for value in found)) for row, found in enumerate(near.distances)]
    head = ("distance to", *(f"neighbour {place + 1}" for place in range(len(near.distances[0]))))
    usual = f"<p>Half of the training images lie within {near.usual:.4g} of another one.</p>"
    return _table(rows, head) + usual


def _lineage(manifests: Sequence[Manifest]) -> str:
    rows = [
        (
            found.stage,
            found.digest[:16],
            ", ".join(f"{name} {digest[:16]}" for name, digest in found.inputs.items()),
            ", ".join(f"{value:,} {name}" for name, value in found.counts.items()),
            found.provenance.mlflow_run_id or "",
            found.code_version,
            uri.redact(found.url),
        )
        for found in manifests
    ]
    head = ("stage", "digest", "made from", "counts", "MLflow run", "code", "manifest")
    return f"<h2>From the images to the numbers</h2>{_table(rows, head)}"


def _table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = [f"<tr>{cells}</tr>", *(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _cell(text: str) -> str:
    number = text.replace(",", "").replace(".", "", 1).lstrip("-").isdigit()
    return f'<td class="n">{escape(text)}</td>' if number else f"<td>{escape(text)}</td>"
