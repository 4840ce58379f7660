"""The checks of servers, against real ones."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import MlflowServer
from prefect_rest import PASSWORD

from flows import servers as product
from flows.doctor import servers
from storage.errors import InputError
from storage.finding import Finding

NOWHERE = "http://127.0.0.1:9"


def test_a_prefect_server_that_is_set_answers(prefect_api: str, tmp_path: Path) -> None:
    found = servers.prefect(str(tmp_path))
    assert found.state == "ok", found
    assert prefect_api in found.seen


def test_a_password_that_is_refused_is_not_shown(prefect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("PREFECT_API_URL", f"{prefect}/api")
    with temporary_settings({PREFECT_API_URL: f"{prefect}/api", PREFECT_API_AUTH_STRING: "ditflow:not-this-one"}):
        found = servers.prefect(str(tmp_path))
    assert found.state == "failed"
    assert "PREFECT_API_AUTH_STRING" in found.to_do
    assert "not-this-one" not in str(found)
    assert PASSWORD not in str(found)


def test_a_prefect_server_that_is_away_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("PREFECT_API_URL", f"{NOWHERE}/api")
    with temporary_settings({PREFECT_API_URL: f"{NOWHERE}/api"}):
        found = servers.prefect(str(tmp_path))
    assert found.state == "failed"
    assert NOWHERE in found.seen


def test_without_a_prefect_server_one_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    found = servers.prefect(str(tmp_path))
    assert found.state == "ok"
    assert "each command starts its own" in found.seen
    assert list(tmp_path.iterdir()) == []


def test_an_mlflow_server_that_is_set_answers_with_its_version(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    found = servers.mlflow(str(tmp_path))
    assert found.state == "ok", found
    assert mlflow_server.address in found.seen


def test_an_mlflow_server_that_is_away_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    found = servers.mlflow(str(tmp_path))
    assert found.state == "failed"
    assert NOWHERE in found.seen


@pytest.mark.parametrize(
    ("check", "variable"), [(servers.prefect, "PREFECT_API_URL"), (servers.mlflow, "MLFLOW_TRACKING_URI")]
)
def test_a_login_in_an_address_is_named_and_not_shown(
    check: Callable[[str], Finding], variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "https://me:secret@lab.example.org/api")
    with pytest.raises(InputError, match=f"{variable} contains a login.*; write it without, and set") as refused:
        check(str(tmp_path))
    assert "secret" not in str(refused.value)


def test_without_an_mlflow_server_the_database_is_tried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = servers.mlflow(str(root))
    assert found.state == "ok"
    assert str(root / "mlflow.db") in found.seen


def test_if_only_the_mlflow_server_of_up_has_died_the_database_is_tried(
    prefect: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, "")  # which the check sets
    with product.announced(str(root), prefect, NOWHERE, PASSWORD):
        found = servers.mlflow(str(root))
    assert os.environ["PREFECT_API_URL"] == f"{prefect}/api"  # it has found that of `up`
    assert found.state == "ok"
    assert str(root / "mlflow.db") in found.seen


def test_a_broken_database_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    with pytest.raises(InputError, match="move the file away"):
        servers.mlflow(str(tmp_path))


@pytest.mark.parametrize(
    ("theirs", "state"), [("3.8.8", "ok"), ("3.8.1", "ok"), ("3.9.0", "warning"), ("2.20.1", "warning")]
)
def test_another_version_of_the_server(theirs: str, state: str) -> None:
    assert servers._compared("Prefect", theirs, "3.8.8").state == state


def test_a_port_that_is_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        monkeypatch.setattr(servers, "PORTS", {"Prefect": taken, "MLflow": product.free_port()})
        found = servers.ports(str(tmp_path))
    assert found.state == "warning"
    assert f"taken: port {taken} (Prefect)" in found.seen
    assert "--prefect-port" in found.to_do
