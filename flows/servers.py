"""The servers behind the product, started on 127.0.0.1 for as long as they are needed."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import psutil

from flows.children import child
from storage import uri
from storage.errors import DitflowError

HOST = "127.0.0.1"
START_SECONDS = 120.0
SERVERS = "servers.json"


@contextmanager
def prefect_server(home: Path, port: int = 0, *, scheduler: bool = False) -> Iterator[str]:
    """A Prefect server with its database below ``home``; yields its address.

    Args:
        port: 0 takes a free one.
        scheduler: run the services that schedules, automations and workers need.

    Raises:
        DitflowError: the port is taken, or it does not come up; the line names its log.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    command += [] if scheduler else ["--no-services"]
    env = prefect_env(home) | {"PREFECT_UI_API_URL": f"http://{HOST}:{port}/api"}
    with _server("prefect-server", home, command, env, port, "/api/health") as address:
        yield address


@contextmanager
def mlflow_server(folder: Path, port: int = 0) -> Iterator[str]:
    """An MLflow server over ``folder/mlflow.db``; yields its address.

    Raises:
        DitflowError: the port is taken, or it does not come up; the line names its log.
    """
    port, folder = port or free_port(), folder.absolute()
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--timeout-graceful-shutdown 3"]  # open pages would hold its end up
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", (folder / "mlflow-artifacts").as_uri()]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with _server("mlflow-server", folder, command, env, port, "/health") as address:
        yield address


def local_home(root: str) -> Path:
    """The local folder that belongs to a root: the root itself, or ``runs`` here for a remote one."""
    return uri.local_path(root) or Path("runs").absolute()


def announce(root: str, prefect: str, mlflow: str) -> Path:
    """Note the addresses of the servers of a root, for other commands on this machine to use."""
    path = local_home(root) / SERVERS
    path.write_text(json.dumps({"pid": os.getpid(), "prefect": prefect, "mlflow": mlflow}))
    return path


def use_running(root: str) -> bool:
    """Point this process at the servers that ``ditflow up`` runs for a root, if it does.

    If only its MLflow server is gone, runs go to that server's database itself.
    """
    try:
        servers = json.loads((local_home(root) / SERVERS).read_bytes())
        pid, prefect, mlflow = int(servers["pid"]), str(servers["prefect"]), str(servers["mlflow"])
    except (OSError, ValueError, TypeError, KeyError):  # none, or cut short
        return False
    if not (psutil.pid_exists(pid) and _healthy(f"{prefect}/api/health")):
        return False
    os.environ["PREFECT_API_URL"] = f"{prefect}/api"
    if _healthy(f"{mlflow}/health"):
        os.environ.setdefault("MLFLOW_TRACKING_URI", mlflow)
    return True


def prefect_env(home: Path) -> dict[str, str]:
    """The environment in which Prefect keeps to itself and to ``home``."""
    return {
        "PREFECT_HOME": str(home.absolute()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def bypass_proxy() -> None:
    """Have this process and its children reach our own servers directly."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether nobody listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0


@contextmanager
def _server(name: str, folder: Path, command: list[str], env: dict[str, str], port: int, health: str) -> Iterator[str]:
    if not is_free(port):  # else we would take whoever answers there for ours
        raise DitflowError(f"{name}: port {port} of {HOST} is taken; stop what listens there, or choose another port")
    folder.mkdir(parents=True, exist_ok=True)
    log, address = folder / f"{name}.log", f"http://{HOST}:{port}"
    with log.open("wb") as output, child(command, env=env, output=output) as process:
        _wait_healthy(name, process, address + health, log)
        yield address


def _wait_healthy(name: str, process: "subprocess.Popen[str]", health: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DitflowError(f"{name} ended with code {process.returncode} before it was up; its log is {log}")
        if _healthy(health):
            return
        time.sleep(0.1)
    raise DitflowError(f"{name} did not answer at {health} within {START_SECONDS:.0f} s; its log is {log}")


def _healthy(address: str) -> bool:
    """Whether a server on this machine answers; no proxy is asked, whatever the environment says."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=2):
            return True
    except (OSError, HTTPException, ValueError):  # ValueError: not an address
        return False
