"""The Prefect and MLflow servers, each run for the length of a ``with`` block, as `flows.access` says.

``ditflow up`` writes the addresses of its servers to ``servers.json`` in the root, where other commands on this machine
find them (`use_running`). It locks the file, and the system frees the lock when the process ends, however it ends.
Without ``up`` a command starts a Prefect server of its own, and MLflow's runs go to a sqlite file in the root without a
server.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from flows.access import HOST, MLFLOW_PASSWORD, MLFLOW_USER, Access
from flows.children import child, has_ended
from storage import uri
from storage.errors import DitflowError, InputError
from storage.rows.cache import locked

LOGGER = logging.getLogger(__name__)
START_SECONDS = 120.0
"""How long a server may take to start."""
ANSWER_SECONDS = 2.0
"""How long a server may take for one answer."""
SERVERS = "servers.json"
"""File in the root with the addresses of the servers of a running ``ditflow up``."""
MLFLOW_DATABASE = "mlflow.db"
"""File in the root with MLflow's runs and models."""
MLFLOW_ARTIFACTS = "mlflow-artifacts"
"""Folder in the root with the artifacts of its runs and models."""
MLFLOW_USERS = "mlflow-users.db"
"""File in the root with who may use MLflow, if it asks for passwords and there is no Postgres."""
MLFLOW_PASSWORDS = "mlflow-passwords.ini"
"""File in the root with how MLflow asks for passwords."""
WORKERS = "workers"
"""Folder in the root with the logs of the workers of ``ditflow worker``."""
LOCAL = Access()
NOTE = ("host", "prefect", "mlflow", "password", "mlflow_user", "mlflow_password", "shared")
"""What the file says."""
SHORT_LIVED = "DITFLOW_SHORT_LIVED_PREFECT"
"""Environment variable that is set where Prefect's server ends with the command: nothing else links to its pages."""
LOGINS = {
    "PREFECT_API_URL": "PREFECT_API_AUTH_STRING",
    "MLFLOW_TRACKING_URI": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (PGUSER and PGPASSWORD for Postgres)",
}
"""What has the login for the server that a variable names."""
_LOGIN = re.compile(r"://[^/:]*(:[^@]*)?@|[?&]\w*password=", re.IGNORECASE)
_DATABASES = {"prefect-server": "prefect.db", "mlflow-server": MLFLOW_DATABASE}
_FOR_ANOTHER_SERVER = ("PREFECT_SERVER_", "PREFECT_API_DATABASE_", "PREFECT_UI_", "PREFECT_PROFILE")


@dataclass(frozen=True)
class Server:
    """A server that has answered."""

    name: str
    address: str
    process: "subprocess.Popen[str]"
    log: Path

    @property
    def has_ended(self) -> bool:
        """Whether its process has ended."""
        return has_ended(self.process)

    @property
    def listens(self) -> bool:
        """Whether it takes a connection. A busy one may refuse some."""
        address = urlsplit(self.address)
        return not is_free(address.port or 0, address.hostname or HOST)


@contextmanager
def prefect_server(
    home: Path, port: int = 0, *, password: str, scheduler: bool = False, access: Access = LOCAL
) -> Iterator[Server]:
    """A Prefect server with its database below ``home``, or in Postgres.

    It runs code for whoever may create deployments, so it answers nobody without the password (Prefect calls it the
    auth string), and no page of another origin.

    Args:
        home: folder of the database and the log.
        port: 0 for a free one.
        password: see `new_password`; clients take it from ``PREFECT_API_AUTH_STRING``.
        scheduler: run the services that schedules, automations and workers need.
        access: where it listens, and where its database is.

    Raises:
        DitflowError: the port is taken, or the server does not start; the line names its log.
    """
    port, postgres = port or free_port(), access.postgres
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", access.host, "--port", str(port)]
    command += [] if scheduler else ["--no-services"]
    address = f"http://{access.host}:{port}"
    database = postgres.database("asyncpg", "prefect") if postgres else sqlite_url(home / "prefect.db", "aiosqlite")
    env: dict[str, str | None] = {name: None for name in os.environ if name.startswith(_FOR_ANOTHER_SERVER)}
    env |= prefect_env(home) | (postgres.env if postgres else {})
    env |= {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_UI_API_URL": f"{address}/api",
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_API_AUTH_STRING": password,  # its own services are clients too
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{address},http://localhost:{port}" if access.is_local else address,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }
    with _server("prefect-server", home, command, env, address, "/api/health") as server:
        yield server


@contextmanager
def mlflow_server(folder: Path, port: int = 0, *, access: Access = LOCAL, artifacts: str = "") -> Iterator[Server]:
    """An MLflow server over ``folder/mlflow.db``, or over Postgres.

    Clients write artifacts below ``folder`` themselves, which commands without a server do too. Over Postgres they may
    be on other machines, so they send artifacts to the server, which alone needs the keys of their store.

    Args:
        folder: of the database, the log and the artifacts.
        port: 0 for a free one.
        access: where it listens, whom it asks for passwords, and where its database is.
        artifacts: URL at which the server keeps artifacts; only over Postgres, and needed there.

    Raises:
        DitflowError: the port is taken, or the server does not start; the line names its log.
    """
    port, folder, postgres = port or free_port(), folder.absolute(), access.postgres
    command = [sys.executable, "-m", "mlflow", "server", "--host", access.host, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--timeout-graceful-shutdown 3"]  # else open browser pages delay its end
    database = postgres.database("psycopg", "mlflow") if postgres else sqlite_url(folder / MLFLOW_DATABASE)
    command += ["--backend-store-uri", database]
    if postgres:
        command += ["--artifacts-destination", artifacts]
    else:
        command += ["--no-serve-artifacts", "--default-artifact-root", (folder / MLFLOW_ARTIFACTS).as_uri()]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | (postgres.env if postgres else {})
    address = f"http://{access.host}:{port}"
    if not access.is_local:
        env |= {"MLFLOW_SERVER_ALLOWED_HOSTS": f"{access.host}:{port}", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": address}
    if access.mlflow:
        command += ["--app-name", "basic-auth"]
        env |= _passwords(folder, database if postgres else sqlite_url(folder / MLFLOW_USERS), access.mlflow)
    with _server("mlflow-server", folder, command, env, address, "/health") as server:
        yield server


def _passwords(folder: Path, database: str, administrator: tuple[str, str]) -> dict[str, str]:
    """The environment in which MLflow asks for passwords. Who has one may log to all experiments and models."""
    users = {"default_permission": "EDIT", "database_uri": database, "auth_cache_ttl_seconds": "600"}
    users["authorization_function"] = "mlflow.server.auth:authenticate_request_basic_auth"
    settings = ConfigParser(interpolation=None)
    settings["mlflow"] = {key: value.replace("%", "%%") for key, value in users.items()}  # MLflow interpolates
    with (folder / MLFLOW_PASSWORDS).open("w", encoding="utf-8") as file:
        settings.write(file)
    return {
        "MLFLOW_AUTH_CONFIG_PATH": file.name,
        MLFLOW_USER: administrator[0],
        MLFLOW_PASSWORD: administrator[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
    }


def sqlite_url(path: Path, driver: str = "pysqlite") -> str:
    """The SQLAlchemy URL of a database file, whatever characters its path has."""
    from sqlalchemy.engine import URL  # takes a while

    url = URL.create(f"sqlite+{driver}", database=str(path.absolute())).render_as_string(hide_password=False)
    plain = f"sqlite:///{path.absolute()}"
    # MLflow would make a folder by the undecoded name if it knew a quoted URL as one of sqlite.
    return plain if url == plain.replace("sqlite", "sqlite+pysqlite", 1) else url


def local_home(root: str) -> Path:
    """The local folder of a root: the root itself, or ``runs`` in the current folder if the root is remote."""
    return uri.local_path(root) or Path("runs").absolute()


def new_password() -> str:
    """A password for a Prefect server, in the form that its UI asks for."""
    return f"ditflow:{secrets.token_urlsafe(12)}"


@contextmanager
def announced(
    root: str, prefect: str, mlflow: str, password: str, *, login: tuple[str, str] = ("", ""), shared: bool = False
) -> Iterator[None]:
    """Keep the addresses of a root's servers in `SERVERS`, which only this user can read, for the length of the block.

    The file is locked as long as this process lives: who finds it unlocked knows that the servers are gone.

    Args:
        root: folder of all outputs.
        prefect: address of Prefect's server.
        mlflow: address of MLflow's server.
        password: Prefect's.
        login: user and password for MLflow, if it asks for them.
        shared: whether other roots and machines use the servers, too.
    """
    path = local_home(root) / SERVERS
    path.unlink(missing_ok=True)  # one that is there may be readable by others
    note = {"host": socket.gethostname(), "prefect": prefect, "mlflow": mlflow, "password": password}
    note |= {"mlflow_user": login[0], "mlflow_password": login[1], "shared": "yes" if shared else ""}
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123  a descriptor
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            LOGGER.warning("%s: no locks here (%s); other commands will not find these servers", path, error.strerror)
        json.dump(note, file)
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def given_address(variable: str) -> str:
    """The address in a variable of `LOGINS`; empty if the environment has none.

    Raises:
        InputError: it contains a login: addresses are shown, and stored beside what is made.
    """
    address = os.environ.get(variable, "")
    if _LOGIN.search(address):
        remedy = f"write it without, and set {LOGINS[variable]}"
        raise InputError(f"{variable} contains a login, which others would see; {remedy}")
    return address


def running(root: str) -> dict[str, str] | None:
    """What a ``ditflow up`` that runs on this machine has announced for a root; None if there is none."""
    try:
        with (local_home(root) / SERVERS).open("rb") as file:
            note: Any = json.load(file) if _is_locked(file) else None
            return {name: str(note[name]) for name in NOTE}
    except (OSError, ValueError, TypeError, KeyError):  # no such file, one that was left behind, or a damaged one
        return None


def use_running(root: str) -> bool:
    """Use the servers of a running ``ditflow up`` for a root; False if there is none.

    If only its MLflow server has died, runs go to the server's database file directly, if it has one.
    """
    note = running(root)
    if note is None or note["host"] != socket.gethostname() or not _healthy(f"{note['prefect']}/api/health"):
        return False
    os.environ |= {"PREFECT_API_URL": f"{note['prefect']}/api", "PREFECT_API_AUTH_STRING": note["password"]}
    bypass_proxy(urlsplit(note["prefect"]).hostname or HOST)
    if note["shared"] or _healthy(f"{note['mlflow']}/health"):
        _use_mlflow(note)
    return True


def use_shared_mlflow(root: str) -> None:
    """Use the MLflow server of a running ``ditflow up`` whose runs are not in the root's own file."""
    note = running(root)
    if note is not None and note["shared"] and note["host"] == socket.gethostname():
        _use_mlflow(note)


def _use_mlflow(note: Mapping[str, str]) -> None:
    address = note["mlflow"]
    if os.environ.get("MLFLOW_TRACKING_URI") in (None, "", address):
        os.environ["MLFLOW_TRACKING_URI"] = address
        bypass_proxy(urlsplit(address).hostname or HOST)
        if note["mlflow_user"]:
            use_login(note["mlflow_user"], note["mlflow_password"])


def use_login(user: str, password: str) -> None:
    """Give MLflow's clients a login, unless they have one."""
    if not os.environ.get("MLFLOW_TRACKING_USERNAME"):
        os.environ |= {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}


def prefect_env(home: Path) -> dict[str, str]:
    """Environment variables that keep Prefect's files in ``home`` and turn its telemetry off."""
    return {
        "PREFECT_HOME": str(home.absolute()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def bypass_proxy(host: str = HOST) -> None:
    """Let this process and its children reach servers of this machine without a proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        given = os.environ.get(name, "").split(",")
        os.environ[name] = ",".join(filter(None, [*given, host] if host not in given else given))


def free_port() -> int:
    """A port on 127.0.0.1 on which nothing listens."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def is_free(port: int, host: str = HOST) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) != 0


def _is_locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


@contextmanager
def _server(
    name: str, folder: Path, command: list[str], env: Mapping[str, str | None], address: str, health: str
) -> Iterator[Server]:
    host, _, port = address.removeprefix("http://").partition(":")
    if not is_free(int(port), host):  # else another server there would be taken for ours
        raise DitflowError(f"{name}: port {port} of {host} is taken; stop what listens there, or choose another port")
    log = folder / f"{name}.log"
    with ExitStack() as stack:
        with locked(folder / name) as lock:  # two servers that migrate one database at once break it
            log.write_bytes(b"")
            output = stack.enter_context(log.open("ab"))  # another server may write to the same log
            process = stack.enter_context(child(command, env=env, output=output, keep=[lock]))
            server = Server(name, address, process, log)
            _wait_healthy(server, address + health)
        yield server


def _wait_healthy(server: Server, health: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.has_ended:
            raise DitflowError(
                f"{server.name} ended with code {server.process.returncode} before it answered{_reason(server)}; "
                f"its log is {server.log}"
            )
        if _healthy(health):
            return
        time.sleep(0.1)
    raise DitflowError(
        f"{server.name} did not answer at {health} within {START_SECONDS:.0f} s; its log is {server.log}"
    )


def _reason(server: Server) -> str:
    """What a server's log says of its database, with the remedy; empty if it says nothing of it."""
    found = re.findall(r"^\S*sqlite3\.\w+: (.*)$", server.log.read_text(errors="replace"), re.MULTILINE)
    if not found:
        return ""
    return f" ({found[-1]}); if its database is damaged, move {server.log.with_name(_DATABASES[server.name])} away"


def _healthy(address: str) -> bool:
    """Whether a server on this machine answers, asked without a proxy."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=ANSWER_SECONDS):
            return True
    except (OSError, HTTPException, ValueError):  # ValueError: not an address
        return False
