"""The Prefect server that a command uses: of the environment, of Prefect's profile, or none that answers."""

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import refused
from faults import dead_address
from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect_rest import PASSWORD

from flows import prefect_server, processes, servers
from flows.command.main import main
from flows.command.pools import submit
from flows.prefect_server import serving_prefect
from flows.settle import settled
from storage.errors import DitflowError

REPOSITORY = Path(__file__).parents[2]
PROFILES = """
active = "{active}"
[profiles.lab]
PREFECT_API_URL = "{address}/api"
PREFECT_API_AUTH_STRING = "{password}"
[profiles.alone]
PREFECT_LOGGING_LEVEL = "INFO"
"""


@pytest.fixture
def settings_of_module() -> Iterator[None]:
    """Prefect's settings are again those of the environment, once a test has given that back."""
    yield
    refresh_global_settings_context()


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    return tmp_path / "profiles.toml"


def test_the_active_profile_counts_as_the_environment(
    profiles: Path, prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles.write_text(PROFILES.format(active="lab", address=prefect, password=PASSWORD))
    assert prefect_server.use_given() is True
    assert os.environ["PREFECT_API_URL"] == f"{prefect}/api"
    assert os.environ["PREFECT_API_AUTH_STRING"] == PASSWORD
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.setenv("PREFECT_PROFILE", "alone")
    assert prefect_server.use_given() is False


@pytest.mark.parametrize("text", [None, "", "active = 'lab'", "[profiles", PROFILES.replace("{active}", "none")])
def test_without_a_profile_there_is_no_server(profiles: Path, text: str | None) -> None:
    if text is not None:
        profiles.write_text(text)
    assert prefect_server.use_given() is False
    assert "PREFECT_API_URL" not in os.environ


@pytest.mark.parametrize("by_profile", [True, False])
def test_a_server_that_does_not_answer_is_one_line(
    by_profile: bool,
    profiles: Path,
    root: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dead = dead_address()
    if by_profile:
        profiles.write_text(PROFILES.format(active="lab", address=dead, password=PASSWORD))
    else:
        monkeypatch.setenv("PREFECT_API_URL", f"{dead}/api")
    assert main(["shard", "demo", "--root", str(root), "--set", f"archive.train={images}"]) == 1
    unset = "run `prefect config unset PREFECT_API_URL`" if by_profile else "unset PREFECT_API_URL"
    line = f"fault: {dead}/api: Prefect does not answer (Connection refused); start it, or {unset}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("place", ["PREFECT_API_URL", "profile", "MLFLOW_TRACKING_URI"])
def test_a_login_in_an_address_is_refused_and_not_shown(
    place: str,
    profiles: Path,
    root: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = "https://me:secret@lab.example.org"
    if place == "profile":
        profiles.write_text(PROFILES.format(active="lab", address=address, password=PASSWORD))
    else:
        monkeypatch.setenv(place, f"{address}/api")
    said = refused(capsys, ["shard", "demo", "--root", str(root), "--set", f"archive.train={images}"])
    variable = "PREFECT_API_URL" if place == "profile" else place
    assert said.startswith(f"error: {variable} contains a login, which others would see; write it without, and set ")
    assert "secret" not in said


def test_a_server_that_goes_away_is_one_line(root: Path, prefect_api: str) -> None:
    with (
        pytest.raises(DitflowError, match=r"Prefect does not answer any more \(.*\); start it"),
        settled(str(root), alone=False),
        temporary_settings({PREFECT_API_URL: f"{dead_address()}/api"}),
        get_client(sync_client=True) as client,
    ):
        client.read_flows()
    (left,) = processes.others(str(root)).killed  # the next command tells Prefect that the runs have ended
    processes.forget(str(root), left)


def test_a_wrong_password_is_one_line(root: Path, prefect_api: str) -> None:
    with (
        pytest.raises(DitflowError, match=r"Prefect refuses \(.*401 Unauthorized.*\); see .*PREFECT_API_AUTH_STRING$"),
        settled(str(root), alone=False),
        temporary_settings({PREFECT_API_AUTH_STRING: "ditflow:guessed"}),
        get_client(sync_client=True) as client,
    ):
        client.read_flows()


def test_a_wrong_password_is_one_line_for_deployments_and_pools_too(
    root: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    said = r"Prefect refuses \(.*401 Unauthorized.*\); see .*PREFECT_API_AUTH_STRING"
    with temporary_settings({PREFECT_API_AUTH_STRING: "ditflow:guessed"}):
        assert main(["deploy", "--root", str(root)]) == 1
        assert re.fullmatch(rf"fault: {prefect_api}/api: {said}\n", capsys.readouterr().err)
        with pytest.raises(DitflowError, match=said):
            submit([], Namespace(root=str(root), pool="gpu", queue=None))


def test_the_server_of_ditflow_up_serves_a_process_that_knows_prefect_until_the_block_ends(
    settings_of_module: None, profiles: Path, prefect: str, root: Path
) -> None:
    before = dict(os.environ)
    with servers.announced(str(root), prefect, dead_address(), PASSWORD):
        with serving_prefect(str(root)), get_client(sync_client=True) as client:
            assert PREFECT_API_URL.value() == f"{prefect}/api"
            client.read_flows()
        assert dict(os.environ) == before
        assert PREFECT_API_URL.value() is None
