"""Champion and candidate in the registry of a real MLflow server."""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from command_line import refused
from faults import MlflowServer, dead_address
from mlflow import MlflowClient

from flows.command.main import main
from flows.registry.config import PromotionRule
from flows.registry.promotion import EVALUATION_TAG, PROMOTION_TAG, Evaluation, apply_rule, promote
from storage.errors import DitflowError, InputError

CONDITIONS: dict[str, str | int | float] = {"count": 500, "steps": 50, "guidance_scale": 2.0, "seed": 0}


class Registry:
    """A registered model of its own for a test, with versions that are only numbers."""

    def __init__(self, address: str) -> None:
        self.name, self.client = f"model-{uuid4().hex[:8]}", MlflowClient(address)
        self.client.create_registered_model(self.name)

    def add(self, fd: float, margin: float = 1.0, alias: str | None = None, **conditions: Any) -> int:
        metrics = {"fd": fd, "fd_low": fd - margin, "fd_high": fd + margin, "recall": 1 / fd}
        found = Evaluation(distance="FD[demo-digits@1234]", metrics=metrics, conditions=CONDITIONS | conditions)
        tags = {EVALUATION_TAG: found.model_dump_json()}
        version = int(self.client.create_model_version(self.name, "s3://nowhere/model", tags=tags).version)
        if alias:
            self.client.set_registered_model_alias(self.name, alias, str(version))
        return version

    @property
    def champion(self) -> int | None:
        found = self.client.get_registered_model(self.name).aliases.get("champion")
        return None if found is None else int(found)

    def records(self, version: int) -> list[dict[str, Any]]:
        tags = self.client.get_model_version(self.name, str(version)).tags
        return [json.loads(tags[name]) for name in sorted(tags) if name.startswith(f"{PROMOTION_TAG}.")]


@pytest.fixture
def registry(mlflow_server: MlflowServer) -> Registry:
    return Registry(mlflow_server.address)


def decide(registry: Registry, version: int, **rule: Any) -> str:
    return apply_rule(registry.client, registry.name, version, PromotionRule(**rule))


def test_the_first_version_is_champion(registry: Registry) -> None:
    first = registry.add(10)
    line = decide(registry, first)
    assert line == (
        f"{registry.name} 1 is champion: "
        "rule: distance lower by at least 0 beyond its interval; version 1: fd 10 (9 to 11)"
    )
    assert registry.champion == first
    assert decide(registry, first) == f"{registry.name} 1 is already the champion"
    (record,) = registry.records(first)
    assert record["decision"] == "promoted"
    assert record["old_champion"] is None


def test_a_gain_must_exceed_the_interval_and_the_rule(registry: Registry) -> None:
    registry.add(10, alias="champion")
    within = registry.add(9)
    assert "version 2: fd 9 (8 to 10); better by 1 ± 1.4" in decide(registry, within)
    assert registry.champion == 1
    assert registry.records(within)[0]["decision"] == "kept"
    small = registry.add(7)
    assert "is not promoted" in decide(registry, small, min_gain=2.0)
    assert registry.champion == 1
    assert "3 is champion" in decide(registry, small, min_gain=1.5)
    assert registry.champion == small
    kept, promoted = registry.records(small)
    assert (kept["decision"], promoted["decision"]) == ("kept", "promoted")
    assert promoted["old_champion"] == 1
    assert promoted["values"] == {
        "1": {"fd": 10, "fd_low": 9, "fd_high": 11},
        "3": {"fd": 7, "fd_low": 6, "fd_high": 8},
    }
    assert promoted["gain"] == 3
    assert promoted["margin"] == pytest.approx(2**0.5)
    assert promoted["who"]
    assert kept["when"] < promoted["when"]


def test_another_metric_and_direction(registry: Registry) -> None:
    registry.add(10, alias="champion")
    version = registry.add(5)
    assert "is not promoted: fid: no such metric" in decide(registry, version, metric="fid")
    assert "is not promoted" in decide(registry, version, metric="recall", direction="lower")
    assert "is champion" in decide(registry, version, metric="recall", direction="higher", min_gain=0.05)


def test_numbers_under_different_conditions_are_not_compared(registry: Registry) -> None:
    registry.add(10, alias="champion")
    version = registry.add(1, alias="candidate", guidance_scale=4.0, seed=7)
    line = (
        f"{registry.name} 1 and 2: metrics under different conditions cannot be compared: guidance_scale "
        "(guidance_scale: 2.0 and 4.0); evaluate both under the same ones"
    )
    assert decide(registry, version) == f"{registry.name} 2 is not promoted: {line}"
    with pytest.raises(InputError) as caught:
        promote(registry.name, None, "", "runs")
    assert str(caught.value) == line
    assert registry.champion == 1
    (record,) = registry.records(version)
    assert (record["decision"], record["old_champion"], record["why"]) == ("kept", 1, line)


def test_by_hand_with_a_reason(registry: Registry, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    registry.add(10, alias="champion")
    registry.add(9, alias="candidate")
    root = ["--root", str(tmp_path)]
    assert main(["promote", registry.name, "--reason", "sharper", *root]) == 0
    assert capsys.readouterr().out == (
        f"{registry.name} 2 is champion; before, it was 1; "
        "version 1: fd 10 (9 to 11); version 2: fd 9 (8 to 10); better by 1 ± 1.4\n"
    )
    assert registry.champion == 2
    (record,) = registry.records(2)
    assert (record["by"], record["why"], record["old_champion"]) == ("hand", "sharper", 1)
    assert main(["promote", registry.name, "1", *root]) == 0  # and back
    assert registry.champion == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-model"], "Registered Model with name=no-such-model not found"),
        (["{name}", "9"], "Model Version (name={name}, version=9) not found"),
        (["{name}"], "{name}: has no candidate; name the version to promote"),
        (["{name}", "1"], "{name} 1: is already the champion"),
        (["{name}", "2"], "{name} 2: has no valid tag ditflow.evaluation; register it again"),
    ],
)
def test_what_cannot_be_promoted_is_one_line(
    registry: Registry, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    registry.add(10, alias="champion")
    registry.client.create_model_version(registry.name, "s3://nowhere/model", tags={EVALUATION_TAG: "{"})
    named = [part.format(name=registry.name) for part in arguments]
    assert main(["promote", *named, "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said.format(name=registry.name) in error


def test_without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_address())
    with pytest.raises(DitflowError, match="MLflow does not answer"):
        promote("any", 1, "", "runs")


@pytest.mark.parametrize("variable", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_no_login_in_an_address_is_taken(
    variable: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "https://me:secret@lab.example.org")
    said = refused(capsys, ["promote", "any", "--root", str(tmp_path)])
    assert f"{variable} contains a login" in said
    assert "secret" not in said
