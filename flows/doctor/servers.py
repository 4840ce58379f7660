"""The Prefect and MLflow servers that the commands would use here."""

import base64
import os
import socket
import tempfile
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

from flows import servers
from flows.tracking import database
from storage import uri
from storage.errors import one_line
from storage.finding import Finding, failed, ok, warning

PORTS = {"Prefect": 4200, "MLflow": 5000}
ANSWER_SECONDS = 20.0


def ports(root: str) -> Finding:
    """Whether the ports of ``ditflow up`` are free, and whether this machine's name leads to an address."""
    host = socket.gethostname()
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
    except OSError as error:
        remedy = f"add {host} to /etc/hosts: ranks on several machines find each other by name"
        return warning(f"the name of this machine, {host}, leads to no address ({error.strerror})", remedy)
    seen = f"{host} is {address}"
    if servers.running(root) is not None:
        return ok(f"{seen}; `ditflow up` serves {uri.redact(root)}")
    taken = [f"{port} ({server})" for server, port in PORTS.items() if not servers.is_free(port)]
    if taken:
        remedy = "choose others for `ditflow up` with --prefect-port and --mlflow-port"
        return warning(f"{seen}; taken: port {', '.join(taken)}", remedy)
    return ok(f"{seen}; ports {' and '.join(map(str, PORTS.values()))} are free")


def prefect(root: str) -> Finding:
    """Whether the Prefect server answers and has our version; without one, whether one starts here."""
    ours = version("prefect")
    if not servers.given_address("PREFECT_API_URL") and not servers.use_running(root):
        begin = time.monotonic()
        with (
            tempfile.TemporaryDirectory() as folder,
            servers.prefect_server(Path(folder), password=servers.new_password()),
        ):
            seconds = time.monotonic() - begin
        return ok(f"none is set: each command starts its own, which answered after {seconds:.0f} s; Prefect {ours}")
    address = _shown(os.environ["PREFECT_API_URL"])
    from prefect.client.orchestration import get_client  # reads its settings when it is imported

    try:
        with get_client(sync_client=True) as client:
            theirs = client.api_version()
            client.read_work_pools(limit=1)
    except Exception as error:  # Prefect and its HTTP client raise exceptions of many types
        remedy = "see that the server runs, and check PREFECT_API_URL and PREFECT_API_KEY or PREFECT_API_AUTH_STRING"
        return failed(f"{address} does not answer as Prefect ({one_line(error)})", remedy)
    return _compared(f"Prefect at {address}", theirs, ours)


def mlflow(root: str) -> Finding:
    """Whether MLflow's server answers and has our version; without one, whether its database can be used."""
    ours = version("mlflow")
    if not servers.given_address("MLFLOW_TRACKING_URI"):
        servers.use_running(root)  # whose MLflow may have died
    address = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": f"{ANSWER_SECONDS:.0f}"}
    if not address:
        return _database(servers.local_home(root), ours)
    from mlflow import MlflowClient  # takes seconds

    try:
        MlflowClient(address).search_experiments(max_results=1)
        theirs = _asked(f"{address.rstrip('/')}/version") if address.startswith("http") else ours
    except Exception as error:  # MLflow and its HTTP client raise exceptions of many types
        remedy = "see that the server runs, and check MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and _PASSWORD"
        return failed(f"{_shown(address)} does not answer as MLflow ({one_line(error)})", remedy)
    return _compared(f"MLflow at {_shown(address)}", theirs, ours)


def _database(home: Path, ours: str) -> Finding:
    from mlflow import MlflowClient

    if (home / servers.MLFLOW_DATABASE).exists():
        database.check(home)
        MlflowClient(database.address(home)).search_experiments(max_results=1)
        return ok(f"no server is set: runs go to {home / servers.MLFLOW_DATABASE}; MLflow {ours}")
    with tempfile.TemporaryDirectory() as folder:
        database.create(Path(folder))
    return ok(f"no server is set: runs will go to {home / servers.MLFLOW_DATABASE}; MLflow {ours}")


def _compared(where: str, theirs: str, ours: str) -> Finding:
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        return warning(f"{where} is version {theirs}, and ours is {ours}", f"use {ours} for both")
    return ok(f"{where} answers: {theirs}, ours is {ours}")


def _asked(url: str) -> str:
    """What an MLflow server answers."""
    request = urllib.request.Request(url)
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    elif user:
        request.add_header("Authorization", f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}")
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        return str(answer.read(100).decode().strip())


def _shown(address: str) -> str:
    """An address without a password."""
    return uri.redact(address)
