"""What `ditflow up` is told of passwords, Postgres and its address, and what it refuses."""

import os
import socket
from collections.abc import Sequence

import pytest

from flows import access
from flows.access import MLFLOW_PASSWORD, MLFLOW_USER, POSTGRES, PREFECT_PASSWORD, Access, given_access
from flows.command.main import main
from storage.errors import InputError

SECRET = "of-a-test-p@ss"
EVERYTHING = (POSTGRES, PREFECT_PASSWORD, MLFLOW_PASSWORD)


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*EVERYTHING, MLFLOW_USER, "PGPASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that leads to an address that is not loopback."""
    monkeypatch.setattr(access, "_addresses", lambda _: {"192.0.2.7"})
    return "lab.example"


def test_by_default_prefect_has_a_new_password_and_mlflow_none() -> None:
    assert given_access("localhost", "of:this start") == Access("localhost", "of:this start")


@pytest.mark.parametrize("missing", [EVERYTHING, EVERYTHING[:1], EVERYTHING[1:2], EVERYTHING[2:]])
def test_other_machines_need_passwords_and_postgres(
    missing: Sequence[str], elsewhere: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in EVERYTHING:
        monkeypatch.setenv(name, "" if name in missing else f"ditflow:{SECRET}")
    assert main(["up", "--servers-only", "--host", elsewhere]) == 2
    line = f"error: --host lab.example: other machines can reach the servers, so set {', '.join(missing)}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        (PREFECT_PASSWORD, SECRET, f"{PREFECT_PASSWORD}: write user:password, with at least 12 characters"),
        (PREFECT_PASSWORD, "lab:short", f"{PREFECT_PASSWORD}: write user:password, with at least 12 characters"),
        (MLFLOW_PASSWORD, "short", f"{MLFLOW_PASSWORD}: must have at least 12 characters"),
        *(
            (POSTGRES, given, f"{POSTGRES}: write postgresql://user:password@host:5432, without a database")
            for given in (
                f"mysql://ditflow:{SECRET}@db:3306",
                f"postgresql://ditflow:{SECRET}@db:5432/mine",
                f"postgresql://ditflow:{SECRET}@db:port",
                f"postgresql://ditflow:{SECRET}@db?sslmode=disable",
                f"postgresql://ditflow:{SECRET}@",
                f"postgresql://ditflow:{SECRET}@db:5432",  # an @ that should be %40
                SECRET,
            )
        ),
    ],
)
def test_what_is_wrong_is_refused_in_a_line_without_it(
    variable: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError) as caught:
        given_access("127.0.0.1", "")
    assert str(caught.value) == problem
    assert variable not in os.environ


def test_a_postgres_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv(POSTGRES, f"postgresql://ditflow:{SECRET.replace('@', '%40')}@127.0.0.1:{port}")
    with pytest.raises(InputError, match=rf"^{POSTGRES}: the database prefect: .*port {port} failed") as caught:
        given_access("127.0.0.1", "")
    assert "p@ss" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("variable", "package"), [(POSTGRES, "psycopg"), (MLFLOW_PASSWORD, "flask_wtf")])
def test_a_package_that_is_missing_is_named(variable: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "find_spec", lambda name: None if name == package else object())
    monkeypatch.setenv(variable, "postgresql://ditflow@127.0.0.1:1")
    with pytest.raises(
        InputError, match=rf"^{variable} needs the package {package}: pip install 'ditflow\[servers\]'$"
    ):
        given_access("127.0.0.1", "")


def test_a_host_must_be_an_address_of_this_machine(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EVERYTHING:
        monkeypatch.setenv(name, f"ditflow:{SECRET}")
    with pytest.raises(InputError, match=r"^--host lab\.example: not an address of this machine"):
        given_access(elsewhere, "")


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        ("no-such-name.invalid", "there is no IPv4 address of this name"),
        ("::1", "there is no IPv4 address of this name"),
        ("0.0.0.0", "write the name or address of this machine that others know"),
    ],
)
def test_a_host_must_have_an_address_that_others_know(host: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EVERYTHING:
        monkeypatch.setenv(name, f"ditflow:{SECRET}")
    with pytest.raises(InputError, match=rf"^--host {host}: {problem}"):
        given_access(host, "")


@pytest.mark.parametrize("of_url", ["", f"in-{SECRET.replace('@', '%40')}"])
def test_no_secret_is_shown_or_left(of_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access.Postgres, "check", lambda _: None)
    monkeypatch.setenv(POSTGRES, f"postgresql://ditflow{of_url and f':{of_url}'}@db:5432")
    for name in (PREFECT_PASSWORD, MLFLOW_PASSWORD, "PGPASSWORD"):
        monkeypatch.setenv(name, f"lab:{SECRET}")
    given = given_access("127.0.0.1", "")
    assert given.postgres is not None
    assert given.postgres.env == {"PGPASSWORD": f"in-{SECRET}" if of_url else f"lab:{SECRET}"}
    assert given.postgres.database("asyncpg", "prefect") == "postgresql+asyncpg://ditflow@db:5432/prefect"
    assert SECRET not in repr(given)
    assert not any(SECRET in value for value in os.environ.values())
