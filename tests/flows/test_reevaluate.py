"""Champion and candidate evaluated again, with real MLflow and Prefect servers."""

import shutil
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from faults import MlflowServer, prefect_at
from mlflow import MlflowClient
from mlflow.entities import Metric
from prefect.client.schemas.objects import State
from prefect_rest import PASSWORD, call
from small import Small
from until import until

from flows import servers
from flows.perform import RunSettings
from flows.reevaluate import DRIFTED, Window, reevaluate
from flows.registry.config import RegisterConfig
from flows.registry.promotion import EVALUATION_TAG, Evaluation
from flows.registry.register import REEVALUATE_LABEL, REGISTERED
from storage.errors import InputError
from storage.manifest import Manifest

NAME = "It's_<i>*1"
MONDAY, SUNDAY, NEXT = date(2026, 11, 16), date(2026, 11, 22), date(2026, 11, 23)


def test_a_window_is_a_day_or_a_week() -> None:
    assert Window.of("week", MONDAY) == Window.of("week", SUNDAY) == Window("2026-W47", MONDAY.toordinal())
    assert Window.of("week", NEXT).label == "2026-W48"
    assert Window.of("week", date(2027, 1, 1)).label == "2026-W53"
    assert Window.of("day", SUNDAY) == Window("2026-11-22", SUNDAY.toordinal())
    seeds = {Window.of("week", day).seed for day in (MONDAY, SUNDAY, NEXT)}
    assert len(seeds) == 2
    assert all(0 <= seed < 2**32 for seed in seeds)


class World:
    """Both servers, and a root with a champion and a candidate."""

    def __init__(self, folder: Path, mlflow: MlflowServer, prefect: str) -> None:
        self.prefect, self.client, self.root = prefect, MlflowClient(mlflow.address), folder / "root"
        small = Small(self.root)
        latents = small.latents()
        config = RegisterConfig(model_name=NAME, promote="automatic")
        for steps in (2, 3):
            small.registered(small.evaluated(small.checkpoint(latents, steps)), config)

    def call(self, path: str, body: Any) -> Any:
        return call(self.prefect, path, body)

    def events(self, name: str) -> list[dict[str, Any]]:
        found = self.call("/events/filter", {"filter": {"event": {"name": [name]}}, "limit": 50})
        return list(found["events"])

    def artifact(self) -> str:
        body = {"artifacts": {"key": {"any_": ["reevaluation-it-s-i-1"]}}, "sort": "CREATED_DESC"}
        return str(self.call("/artifacts/filter", body)[0]["data"])

    def again(self, day: date) -> State[str]:
        settings = RunSettings(root=str(self.root))
        state: State[str] = reevaluate(NAME, "week", day, settings, return_state=True)
        return state

    def series(self, version: int) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in self.history(version)]

    def history(self, version: int) -> list[Metric]:
        experiments = [each.experiment_id for each in self.client.search_experiments()]
        runs = self.client.search_runs(experiments, f'tags.`ditflow.series` = "{NAME}/{version}"')
        history = [metric for run in runs for metric in self.client.get_metric_history(run.info.run_id, "fd")]
        return sorted(history, key=lambda metric: metric.step)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, mlflow_server: MlflowServer, prefect_template: Path
) -> Iterator[World]:
    """The Prefect server is one that keeps events."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(prefect_template, folder)
    with servers.prefect_server(folder, password=PASSWORD, scheduler=True) as server, prefect_at(server.address):
        yield World(folder, mlflow_server, server.address)


def test_a_registered_version_is_an_event(world: World) -> None:
    until(lambda: len(world.events(REGISTERED)) == 2, 0.2)
    found = {event["payload"]["version"]: event for event in world.events(REGISTERED)}
    assert set(found) == {1, 2}
    assert found[2]["resource"]["prefect.resource.id"] == f"ditflow.model.{NAME}"
    assert found[2]["payload"]["model_name"] == NAME
    assert found[2]["payload"]["alias"] == "candidate"
    assert found[2]["resource"][REEVALUATE_LABEL] == "false"


def test_both_are_evaluated_with_fresh_seeds_once_a_period(world: World) -> None:
    before = {path: Manifest.read(str(path)) for path in (world.root / "evaluate").iterdir()}
    assert world.again(MONDAY).name == "Completed"
    fresh = [path for path in (world.root / "evaluate").iterdir() if path not in before]
    numbers = sorted(Manifest.read(str(path)).metrics["fd"] for path in fresh)
    found = [each for version in (1, 2) for each in world.series(version)]
    assert [step for step, _ in found] == [MONDAY.toordinal()] * 2
    times = [each.timestamp for version in (1, 2) for each in world.history(version)]
    assert [datetime.fromtimestamp(each / 1000, UTC) for each in times] == [datetime(2026, 11, 16, tzinfo=UTC)] * 2
    assert sorted(value for _, value in found) == pytest.approx(numbers)
    assert not set(numbers) & {manifest.metrics["fd"] for manifest in before.values()}
    seeds = {Manifest.read(str(path)).config["seed"] for path in (world.root / "sample").iterdir()}
    assert seeds == {0, Window.of("week", MONDAY).seed}
    assert world.artifact().startswith("# It's\\_&lt;i&gt;\\*1, 2026-W47")
    assert "1 (champion)" in world.artifact()
    assert "2 (candidate)" in world.artifact()
    assert world.again(SUNDAY).name == "Skipped"
    assert [each for version in (1, 2) for each in world.series(version)] == found


def test_a_number_outside_its_interval_is_an_event_and_in_bold(world: World) -> None:
    tags = world.client.get_model_version(NAME, "2").tags
    told = Evaluation.model_validate_json(tags[EVALUATION_TAG])
    low = {name: value / 10 for name, value in told.metrics.items() if name.startswith("fd")}
    forged = told.model_copy(update={"metrics": told.metrics | low})  # as if the samples had been far better then
    world.client.set_model_version_tag(NAME, "2", EVALUATION_TAG, forged.model_dump_json())
    state = world.again(NEXT)
    world.client.set_model_version_tag(NAME, "2", EVALUATION_TAG, told.model_dump_json())
    assert "2 fd worse" in str(state.message)
    until(lambda: any(event["payload"]["version"] == 2 for event in world.events(DRIFTED)), 0.2)
    event = next(event for event in world.events(DRIFTED) if event["payload"]["version"] == 2)
    payload = event["payload"]
    assert (payload["metric"], payload["period"], payload["aliases"]) == ("fd", "2026-W48", ["candidate"])
    assert payload["change"] == event["resource"]["ditflow.change"] == "worse"
    assert payload["now"] - payload["then"] > payload["margin"] > 0
    assert "2026-W48: **worse**" in world.artifact()
    assert len(world.series(2)) == 2


def test_other_conditions_than_then_are_refused(world: World) -> None:
    tags = world.client.get_model_version(NAME, "1").tags
    told = Evaluation.model_validate_json(tags[EVALUATION_TAG])
    forged = told.model_copy(update={"conditions": told.conditions | {"metrics_dtype": "float16"}})
    world.client.set_model_version_tag(NAME, "1", EVALUATION_TAG, forged.model_dump_json())
    state = world.again(date(2026, 12, 1))
    world.client.set_model_version_tag(NAME, "1", EVALUATION_TAG, told.model_dump_json())
    with pytest.raises(InputError, match="as registered and now: metrics under different conditions .* metrics_dtype"):
        state.result()


def test_a_model_without_champion_and_candidate(world: World) -> None:
    world.client.create_registered_model("nobody")
    state = reevaluate("nobody", settings=RunSettings(root=str(world.root)), return_state=True)
    with pytest.raises(InputError, match="nobody: has neither champion nor candidate"):
        state.result()
    state = reevaluate("no-such-model", settings=RunSettings(root=str(world.root)), return_state=True)
    with pytest.raises(InputError, match="Registered Model with name=no-such-model not found"):
        state.result()
