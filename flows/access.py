"""Who may reach the servers of ``ditflow up``, and where these keep their data, as the environment says.

What is secret is taken out of the environment. Servers get it in environments of their own: no URL, command line or log
has it. The worker and its flows have logins for both servers, as ``servers.json`` has, but not Postgres's password.
"""

import os
import re
import socket
from dataclasses import dataclass, field
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING

from storage.errors import InputError, one_line

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

HOST = "127.0.0.1"
POSTGRES = "DITFLOW_POSTGRES"
PREFECT_PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"
MLFLOW_USER = "MLFLOW_AUTH_ADMIN_USERNAME"
MLFLOW_PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"
DATABASES = ("prefect", "mlflow")
LEAST_CHARACTERS = 12  # of a password, as MLflow asks for
CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Postgres:
    """A Postgres server with a database for each of `DATABASES`."""

    url: "URL"
    """Without a password."""
    password: str = field(repr=False)
    """Empty if it is in a file that Postgres's clients know, or none is needed."""

    def database(self, driver: str, name: str) -> str:
        """The SQLAlchemy URL of a database, without the password."""
        return self.url.set(drivername=f"postgresql+{driver}", database=name).render_as_string(hide_password=False)

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which a process may connect."""
        return {"PGPASSWORD": self.password} if self.password else {}

    def check(self) -> None:
        """See that both databases are there.

        Raises:
            InputError: one of them is not, or Postgres does not answer or refuses.
        """
        need("psycopg", POSTGRES)
        import psycopg

        for name in DATABASES:
            given = self.url.set(database=name).translate_connect_args(database="dbname", username="user")
            try:
                psycopg.connect(**given, password=self.password or None, connect_timeout=CONNECT_SECONDS).close()
            except psycopg.Error as error:
                raise InputError(f"{POSTGRES}: the database {name}: {one_line(error)}") from error


@dataclass(frozen=True)
class Access:
    """Who may reach the servers; by default everybody on this machine, with Prefect's password."""

    host: str = HOST
    """Name or address of this machine under which they are reached."""
    prefect: str = field(default="", repr=False)
    """User and password of Prefect, as user:password."""
    mlflow: tuple[str, str] | None = field(default=None, repr=False)
    """Name and first password of MLflow's administrator. None: it asks nobody."""
    postgres: Postgres | None = None
    """None: each server has a sqlite file in the root."""

    @property
    def is_local(self) -> bool:
        """Whether other machines cannot reach the servers."""
        return _is_loopback(self.host)


def given_access(host: str, new_password: str) -> Access:
    """What the environment says; its secrets are taken out of it.

    Args:
        host: see `Access`.
        new_password: Prefect's, if the environment has none and no other machine can reach the servers.

    Raises:
        InputError: other machines can reach the servers, and something that they then need is not set; or what is set
            is wrong, or Postgres does not answer.
    """
    names = (POSTGRES, PREFECT_PASSWORD, MLFLOW_PASSWORD)
    given = {name: os.environ.pop(name, "") for name in names}
    missing = [name for name in names if not given[name]]
    if missing and not _is_loopback(host):
        raise InputError(f"--host {host}: other machines can reach the servers, so set {', '.join(missing)}")
    _check_host(host)
    user, _, password = given[PREFECT_PASSWORD].partition(":")
    if given[PREFECT_PASSWORD] and (not user or len(password) < LEAST_CHARACTERS):
        raise InputError(f"{PREFECT_PASSWORD}: write user:password, with at least {LEAST_CHARACTERS} characters")
    if given[MLFLOW_PASSWORD] and len(given[MLFLOW_PASSWORD]) < LEAST_CHARACTERS:
        raise InputError(f"{MLFLOW_PASSWORD}: must have at least {LEAST_CHARACTERS} characters")
    if given[MLFLOW_PASSWORD]:
        need("flask_wtf", MLFLOW_PASSWORD)
    admin = (os.environ.get(MLFLOW_USER) or "admin", given[MLFLOW_PASSWORD]) if given[MLFLOW_PASSWORD] else None
    postgres = _postgres(given[POSTGRES]) if given[POSTGRES] else None
    if postgres is not None:
        postgres.check()
    return Access(host, given[PREFECT_PASSWORD] or new_password, admin, postgres)


def need(package: str, what: str) -> None:
    """See that a package is installed.

    Raises:
        InputError: it is not.
    """
    if find_spec(package) is None:
        raise InputError(f"{what} needs the package {package}: pip install 'ditflow[servers]'")


def _postgres(given: str) -> Postgres:
    from sqlalchemy.engine import URL, make_url  # takes a while
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(given)
    except (ArgumentError, ValueError):  # whose text shows the password
        url = None
    whole = url is not None and url.drivername in ("postgresql", "postgres") and not url.database and not url.query
    # A host with an @ is the end of a password that was not quoted.
    if url is None or not whole or not re.fullmatch(r"[\w.-]+", url.host or ""):
        raise InputError(f"{POSTGRES}: write postgresql://user:password@host:5432, without a database")
    password = os.environ.pop("PGPASSWORD", "")
    return Postgres(URL.create("postgresql", url.username, host=url.host, port=url.port), url.password or password)


def _is_loopback(host: str) -> bool:
    return all(ip_address(address).is_loopback for address in _addresses(host))


def _addresses(host: str) -> set[str]:
    try:
        return {str(address[0]) for *_, address in socket.getaddrinfo(host, None, socket.AF_INET)}
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: there is no IPv4 address of this name") from error


def _check_host(host: str) -> None:
    """See that servers can listen there, and others find them by this name."""
    if any(ip_address(address).is_unspecified for address in _addresses(host)):
        raise InputError(f"--host {host}: write the name or address of this machine that others know")
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise InputError(f"--host {host}: not an address of this machine ({error.strerror})") from error
