"""Reevaluation of champion and candidate with a new seed each period, and an event when a metric gets worse or better.

It samples and evaluates each version with the configs that it was registered with, except for the seed. The outputs lie
among those of the stages, so an interrupted reevaluation resumes. A version's metrics are a series in an MLflow run of
its own, with one step for each period.
"""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal, Self
from uuid import NAMESPACE_URL, uuid5

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.export import CheckpointManifest
from dit.metrics.comparison import Gain, gain
from dit.sample import SampleManifest
from dit.samplers.config import SampleConfig
from dit.samplers.guide import NAME as GUIDE
from flows import processes
from flows.names import named
from flows.perform import SKIPPED, RunSettings
from flows.refusing import RefusingFlow
from flows.registry.config import CANDIDATE, CHAMPION
from flows.registry.events import emit
from flows.registry.promotion import Evaluation, check_comparable, evaluation
from flows.registry.register import METRICS_DIGEST_TAG
from flows.report.html import markdown
from flows.stages import HERE, stage_flow
from flows.tracking import runs
from flows.tracking.store import tagged
from storage import uri
from storage.errors import InputError

DRIFTED = "ditflow.metric.drifted"
"""The Prefect event of a metric that differs by more than sampling explains; its resource is ``ditflow.model.<name>``.

Label ``ditflow.change`` of the resource, and ``change`` in the payload, say ``worse`` or ``better``."""
ALARM = 1.5
"""How many times the half width of its 95 % interval a difference must exceed: 3 standard errors. Many versions are
compared in many periods, always with one number from their registration, which may be an outlier."""
SERIES_TAG = "ditflow.series"
NOTE = """The version's metrics, measured again with new seeds: one point for each day or week. To see dates, open
*Model metrics* and choose *Time (wall)* below the gear. Steps are days since the year 1."""

Period = Literal["day", "week"]


@dataclass(frozen=True)
class Window:
    """The day or the ISO week of an evaluation."""

    label: str
    """Such as ``2026-W47`` or ``2026-11-21``."""
    step: int
    """Its first day, counted from the year 1: the step in the series."""

    @classmethod
    def of(cls, period: Literal["day", "week"], day: date) -> Self:
        """The day itself, or the ISO week that it lies in."""
        if period == "day":
            return cls(day.isoformat(), day.toordinal())
        year, week, weekday = day.isocalendar()
        return cls(f"{year}-W{week:02d}", (day - timedelta(days=weekday - 1)).toordinal())

    @property
    def milliseconds(self) -> int:
        """When its first day begins (UTC), since 1970: the time in the series, which MLflow shows as dates."""
        return int(datetime.combine(date.fromordinal(self.step), time(), UTC).timestamp()) * 1000

    @property
    def seed(self) -> int:
        """Seed of the samples: one for each period."""
        return int(uri.sha256(self.label.encode())[:8], 16)


@dataclass(frozen=True)
class _Reevaluation:
    """A version's metrics as registered and now."""

    version: int
    aliases: list[str]
    then: Evaluation
    now: Evaluation

    def changes(self) -> dict[str, Gain]:
        """For each metric with an interval, how much lower it is now."""
        judged = [name for name in self.then.metrics if f"{name}_low" in self.then.metrics]
        return {name: gain(name, "lower", self.then.metrics, self.now.metrics) for name in judged}

    def drifts(self) -> dict[str, Gain]:
        """The changes, up or down, that sampling does not explain."""
        return {name: each for name, each in self.changes().items() if abs(each.value) > ALARM * each.margin}


@RefusingFlow
def reevaluate(
    model_name: str, period: Period = "week", on: date | None = None, settings: RunSettings = HERE
) -> State[str]:
    """Sample champion and candidate with the period's seed and evaluate them as when they were registered.

    Every version has a series of metrics in MLflow with one step for each period. Periods that it has are skipped.

    Args:
        model_name: Name of the registered model.
        period: Evaluate at most once a day or once a week; each period has its own seed.
        on: A day of the period to evaluate for. Default: today (UTC).
        settings: The same for every stage.
    """
    processes.note(flow_run.id, settings.root)
    window = Window.of(period, on or datetime.now(UTC).date())
    named(f"{model_name} {window.label}")
    settings = settings.model_copy(update={"pipeline_id": f"reevaluate-{model_name}-{window.label}"})
    with runs.mlflow_errors(settings.root):
        client, experiment_id = runs.open_client(settings.root)
        missing = {
            version: aliases
            for version, aliases in _versions(client, model_name).items()
            if window.step not in _steps(client, _series(client, experiment_id, model_name, version))
        }
    if not missing:
        return Completed(name=SKIPPED, message=f"already done for {window.label}", data=window.label)
    with runs.pipeline_run(str(settings.pipeline_id), settings.root):
        results = [
            _reevaluate(client, model_name, version, names, window, settings) for version, names in missing.items()
        ]
    _report(model_name, window, results)
    for each in results:  # last: after a kill, events are sent again rather than never
        _log(client, _series(client, experiment_id, model_name, each.version), window, each.now)
    drifted = [f"{each.version} {name} {change}" for each in results for name, change in each.drifts().items()]
    return Completed(message=f"{window.label}: {'; '.join(drifted) or 'no metric drifted'}", data=window.label)


def _versions(client: MlflowClient, name: str) -> dict[int, list[str]]:
    """Champion and candidate, which may be the same version, with their aliases."""
    aliases = client.get_registered_model(name).aliases
    versions: dict[int, list[str]] = {}
    for alias in (CHAMPION, CANDIDATE):
        if alias in aliases:
            versions.setdefault(int(aliases[alias]), []).append(alias)
    if not versions:
        raise InputError(f"{name}: has neither {CHAMPION} nor {CANDIDATE}; register a model or promote one")
    return versions


def _reevaluate(
    client: MlflowClient, name: str, version: int, aliases: list[str], window: Window, settings: RunSettings
) -> _Reevaluation:
    then = evaluation(client, name, version)
    digest = client.get_model_version(name, str(version)).tags[METRICS_DIGEST_TAG]
    metrics = MetricsManifest.read(MetricsManifest.folder(settings.root, digest))
    samples = metrics.parent("samples", SampleManifest)
    checkpoint = samples.parent("checkpoint", CheckpointManifest)
    fresh = _done("sample", checkpoint=checkpoint.url, config=again(samples, window.seed), settings=settings)
    config = EvaluateConfig.model_validate(metrics.config)
    metrics = MetricsManifest.read(_done("evaluate", samples=fresh, config=config, settings=settings))
    now = Evaluation(distance=metrics.distance, metrics=metrics.metrics, conditions=metrics.conditions)
    check_comparable(f"{name} {version}, as registered and now", then, now)
    return _Reevaluation(version, aliases, then, now)


def again(samples: SampleManifest, seed: int) -> SampleConfig:
    """How samples were drawn, with another seed. Their guide may lie elsewhere now."""
    guide = samples.parent(GUIDE, CheckpointManifest).uri if GUIDE in samples.parents else None
    return SampleConfig.model_validate(samples.config).model_copy(update={"seed": seed, "guide": guide})


def _done(stage: str, **given: Any) -> str:
    """Run a stage unless it is done; return its manifest's URL."""
    return str(stage_flow(stage)(**given, return_state=True).result())


def _report(name: str, window: Window, results: list[_Reevaluation]) -> None:
    """Create a table in Prefect, and emit an event for each metric that drifted."""
    for each in results:
        for metric, change in each.drifts().items():
            facts = {"version": each.version, "aliases": each.aliases, "metric": metric, "period": window.label}
            facts |= {"change": change.verdict, "margin": change.margin}
            numbers = {"then": each.then.metrics[metric], "now": each.now.metrics[metric]}
            once = uuid5(NAMESPACE_URL, f"{DRIFTED}/{name}/{each.version}/{metric}/{window.label}")
            emit(DRIFTED, name, facts | numbers, once, {"ditflow.change": change.verdict})
    verdicts = {change.verdict for each in results for change in each.drifts().values()}
    said = " and ".join(f"**{verdict}**" for verdict in sorted(verdicts, reverse=True)) or "within its intervals"
    title = f"# {markdown(name)}, {window.label}: {said}\n\n"
    key = re.sub(r"[^a-z0-9]+", "-", f"reevaluation-{name}".lower()).strip("-")
    create_markdown_artifact(title + _table(results), key=key, description=f"Seed {window.seed}")


def _table(results: list[_Reevaluation]) -> str:
    head = "| version | metric | registered | now | difference | |\n|---|---|---|---|---|---|\n"
    rows = ""
    for each in results:
        who, changes, drifts = f"{each.version} ({', '.join(each.aliases)})", each.changes(), each.drifts()
        for metric, now in each.now.metrics.items():
            change = changes.get(metric)
            difference = f"{-change.value:+.4g} ± {change.margin:.2g}" if change else ""
            alarm = f"**{drifts[metric].verdict}**" if metric in drifts else ""
            then = each.then.metrics.get(metric, float("nan"))
            rows += f"| {who} | {metric} | {then:.6g} | {now:.6g} | {difference} | {alarm} |\n"
    return head + rows


def _series(client: MlflowClient, experiment_id: str, name: str, version: int) -> str:
    """Find or create the run that holds a version's series."""
    which = f"{name}/{version}"
    series = client.search_runs([experiment_id], tagged(SERIES_TAG, which), max_results=1)
    if series:
        return str(series[0].info.run_id)
    tags = {MLFLOW_RUN_NAME: f"{which} again", SERIES_TAG: which, MLFLOW_RUN_NOTE: NOTE}
    run_id = str(client.create_run(experiment_id, tags=tags).info.run_id)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _steps(client: MlflowClient, run_id: str) -> set[int]:
    """The periods that a series has; any metric shows them, because all are sent at once."""
    keys: Any = client.get_run(run_id).data.metrics
    return {metric.step for metric in client.get_metric_history(run_id, min(keys))} if keys else set()


def _log(client: MlflowClient, run_id: str, window: Window, now: Evaluation) -> None:
    metrics = [Metric(key, value, window.milliseconds, window.step) for key, value in now.metrics.items()]
    client.log_batch(run_id, metrics=metrics)
