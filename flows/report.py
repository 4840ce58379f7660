"""What became of a run, for people and for programs."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.contract import Outcome
from flows.runs import pipeline_run_id, tracking_uri
from storage import uri
from storage.manifest import Manifest


def as_json(outcomes: list[Outcome], root: str) -> dict[str, Any]:
    """One object: stages, metrics, and the ids of the MLflow runs by stage and of the pipeline's."""
    manifests = [Manifest.read(outcome.manifest) for outcome in outcomes]
    runs = {manifest.stage: manifest.provenance.mlflow_run_id for manifest in manifests}
    pipeline = manifests[-1].provenance.pipeline_id
    return {
        "stages": [asdict(outcome) for outcome in outcomes],
        "metrics": _metrics(manifests),
        "mlflow_run_ids": runs | ({"pipeline": pipeline_run_id(pipeline, root)} if pipeline else {}),
    }


def show(outcomes: list[Outcome], root: str) -> None:
    """Print a table of the stages, the metrics, and where to look."""
    manifests = [Manifest.read(outcome.manifest) for outcome in outcomes]
    _print_table([[o.name, o.state, f"{o.seconds:.1f} s", o.manifest] for o in outcomes])
    _print_table([[name, f"{value:.4g}"] for name, value in _metrics(manifests).items()])
    pictures = [
        [entry.path.rpartition("/")[2], uri.join(manifest.uri, entry.path)]
        for manifest in manifests
        for entry in manifest.files
        if entry.path.endswith(".png")
    ]
    commands = [["runs, models", _tracking_hint(root)], ["flows, forms", f"ditflow up --root {uri.redact(root)}"]]
    _print_table([*pictures, *commands])


def _tracking_hint(root: str) -> str:
    store = tracking_uri(root)
    return uri.redact(store) if store.startswith("http") else f"mlflow ui --backend-store-uri {uri.redact(store)}"


def _print_table(rows: list[list[str]]) -> None:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    Console(width=max(sum(map(len, row)) + 2 * len(row) + 60 for row in rows) if rows else None).print(table, "")


def _metrics(manifests: list[Manifest]) -> dict[str, float]:
    """The numbers of all stages; a later stage's win."""
    return {name: value for manifest in manifests for name, value in manifest.metrics.items()}
