"""The result of a run, as text or JSON. It imports MLflow, so commands import it after they have run."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from dit.evaluate import MetricsManifest
from flows import over_widths, servers
from flows.command.tables import aligned
from flows.contract import STAGES, Outcome
from flows.over_training import evaluations_of
from flows.registry.config import ModelManifest
from flows.report.page import Shown, page_url
from flows.tracking.runs import experiment_url, pipeline_run_id, tracking_uri
from storage import uri
from storage.manifest import Manifest
from storage.shards.shard import ShardManifest
from storage.shards.summary import summary


def show(options: Namespace, recipe: str, outcomes: list[Outcome]) -> None:
    """Print the results of a recipe's stages, as a table or as one JSON object."""
    if options.json:
        print(json.dumps({"recipe": recipe} | _as_json(outcomes, options.root)), flush=True)
    else:
        _show(recipe, outcomes, options.root)


def _as_json(outcomes: list[Outcome], root: str) -> dict[str, Any]:
    """Stages, metrics, and the ids of the MLflow runs by stage and of the pipeline's; other models by themselves."""
    made = {outcome.name: Manifest.read(outcome.manifest) for outcome in outcomes if outcome.own}
    runs = {name: manifest.provenance.mlflow_run_id for name, manifest in made.items()}
    pipeline = Manifest.read(outcomes[-1].manifest).provenance.pipeline_id
    further = {
        "milestones": [_with_metrics(outcome) for outcome in outcomes if outcome.step is not None],
        "widths": [_with_metrics(outcome) for outcome in outcomes if outcome.std is not None],
    }
    return {
        "stages": [asdict(outcome) for outcome in outcomes if outcome.own],
        **{name: made for name, made in further.items() if made},
        "metrics": _metrics([manifest for name, manifest in made.items() if name in STAGES]),
        "mlflow_run_ids": runs | ({"pipeline": pipeline_run_id(pipeline, root)} if pipeline else {}),
    }


def _with_metrics(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome) | {"metrics": Manifest.read(outcome.manifest).metrics}


def _show(recipe: str, outcomes: list[Outcome], root: str) -> None:
    """Print a recipe's name, a table of the stages, the metrics, and where to look."""
    print(recipe)
    shown = Shown.of(recipe, outcomes, root)
    manifests = shown.stages
    milestones, widths = evaluations_of(outcomes), over_widths.evaluations_of(outcomes)
    for manifest in manifests:
        if manifest.stage == ShardManifest.STAGE:
            _print_table([list(line) for line in summary(ShardManifest.read(manifest.uri))])
    if milestones:
        _print_table([[f"step {step:,}", m.distance, str(m.estimate), m.url] for step, m in milestones.items()])
    if widths:
        _print_table([[f"width {std:g}", m.distance, str(m.estimate), m.url] for std, m in widths.items()])
    if not manifests:
        return
    _print_table([[o.name, o.state, f"{o.seconds:.1f} s", o.manifest] for o in outcomes if o.own])
    _print_table([[name, f"{value:.4g}"] for name, value in _metrics(manifests).items()])
    distances = [
        ["distance", MetricsManifest.read(m.uri).distance] for m in manifests if m.stage == MetricsManifest.STAGE
    ]
    pictures = _pictures(manifests)
    decisions = [
        ["promotion", version.promotion]
        for version in (ModelManifest.read(m.uri) for m in manifests if m.stage == ModelManifest.STAGE)
        if version.promotion
    ]
    page = page_url(shown)
    pictures += [["report", page]] if uri.exists(page) else []
    up = f"{_installed('ditflow')} up --root {quote(uri.redact(root))}"
    served = servers.running(root) or {}
    tracking, forms = _tracking_hint(root, served.get("mlflow")), served.get("prefect") or up
    _print_table([*distances, *decisions, *pictures, ["runs, models", tracking], ["flows, forms", forms]])


def _pictures(manifests: Sequence[Manifest]) -> list[list[str]]:
    """The name and URL of each picture; of the same one in several outputs, the first."""
    found: dict[str, list[str]] = {}
    for manifest in manifests:
        for entry in manifest.files:
            if entry.path.endswith(".png"):
                found.setdefault(entry.sha256, [entry.path.rpartition("/")[2], uri.join(manifest.uri, entry.path)])
    return list(found.values())


def _tracking_hint(root: str, server: str | None) -> str:
    store = server or uri.redact(tracking_uri(root))
    if store.startswith("http"):
        return experiment_url(root, server) or store
    return f"{_installed('mlflow')} ui --backend-store-uri {quote(store)}"


def _installed(command: str) -> str:
    """The path of a command of this environment, relative to the current folder if possible."""
    path = Path(sys.executable).with_name(command)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _print_table(rows: list[list[str]]) -> None:
    print(*aligned(rows), "", sep="\n")


def _metrics(manifests: Sequence[Manifest]) -> dict[str, float]:
    """The metrics of all stages; a later stage replaces those of the same name."""
    return {name: value for manifest in manifests for name, value in manifest.metrics.items()}
