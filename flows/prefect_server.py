"""The Prefect server for flows of this process: that of ``PREFECT_API_URL``, else of ``ditflow up``, else its own.

The variable may also be set in Prefect's active profile (``prefect config set``).

A server of its own runs for as long as it is needed, and is started again when it is killed. Before it ends, the logs
that Prefect has queued are sent.
"""

import logging
import os
import ssl
import sys
import threading
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from urllib.error import HTTPError

from flows import servers
from flows.access import HOST
from flows.settle import settled
from flows.tracking import database
from storage import uri
from storage.errors import DitflowError, one_line

LOGGER = logging.getLogger(__name__)
PREFECT = "prefect.context"
"""The module with Prefect's settings."""
WATCH_SECONDS = 1.0
"""How often the command looks whether its server runs."""


@contextmanager
def serving_prefect(root: str, *, verbose: bool = False) -> Iterator[None]:
    """Point Prefect at its server for the length of the block; start one if there is none.

    Args:
        root: folder of all outputs.
        verbose: print what Prefect and the ranks log, and not only warnings. A process that has imported Prefect
            before has chosen that by ``PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL``.

    Raises:
        InputError: MLflow's database in the root is half-made, or an address contains a login.
        DitflowError: the server that the environment or the profile names does not answer.
    """
    with _own_environment(), _serving(root, verbose=verbose):
        yield


@contextmanager
def _own_environment() -> Iterator[None]:
    """What the block leaves in the environment ends with it. Prefect reads it again if it was imported before."""
    before, known = dict(os.environ), PREFECT in sys.modules
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ |= before
        if known:  # else Prefect would make a folder in the user's home as the command ends
            _read_settings()


def _read_settings() -> None:
    """Let Prefect read the environment again, if it is imported."""
    if PREFECT in sys.modules:
        sys.modules[PREFECT].refresh_global_settings_context()


@contextmanager
def _serving(root: str, *, verbose: bool) -> Iterator[None]:
    if not servers.given_address("MLFLOW_TRACKING_URI"):
        database.check(servers.local_home(root))
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if verbose else "WARNING")
    given = use_given()
    if given or servers.use_running(root):
        _read_settings()
        import_module("flows.pipeline")
        _hide_explained_tracebacks()
        shared = given or (servers.running(root) or {}).get("shared")
        with settled(root, alone=not shared):
            yield
        return
    home, port, password = servers.local_home(root) / "prefect", servers.free_port(), servers.new_password()
    address = {"PREFECT_API_URL": f"http://{HOST}:{port}/api", "PREFECT_API_AUTH_STRING": password}
    os.environ |= servers.prefect_env(home) | address | {servers.SHORT_LIVED: "1"}
    _read_settings()
    warm = threading.Thread(target=_warm_up, args=(root,))
    warm.start()
    serve = partial(servers.prefect_server, home, port, password=password)
    try:
        with serve() as server, _started_again(server, serve):
            warm.join()
            _hide_explained_tracebacks()
            try:
                with settled(root, alone=True):
                    yield
            finally:
                flush_logs()
    finally:
        warm.join()


def use_server(root: str) -> bool:
    """Use the server that is given, or that of a running ``ditflow up``; False if there is neither.

    Raises:
        InputError: the address of the given one contains a login.
        DitflowError: it does not answer.
    """
    return use_given() or servers.use_running(root)


def use_given() -> bool:
    """Use the server that the environment or Prefect's active profile names; False if neither does.

    Raises:
        InputError: the address contains a login.
        DitflowError: it does not answer.
    """
    unset = "unset PREFECT_API_URL"
    if not os.environ.get("PREFECT_API_URL"):
        if not use_profile():
            return False
        unset = f"run `prefect config {unset}`"
    address = servers.given_address("PREFECT_API_URL")
    if (problem := _problem(f"{address.rstrip('/')}/health")) is not None:
        raise DitflowError(f"{uri.redact(address)}: Prefect does not answer ({problem}); start it, or {unset}")
    return True


def use_profile() -> bool:
    """Use the server that Prefect's active profile names; False if it names none."""
    profile = _profile()
    if "PREFECT_API_URL" not in profile:
        return False
    for name, value in profile.items():
        os.environ[name] = os.environ.get(name) or value
    return True


def _profile() -> dict[str, str]:
    """Address and credentials of the server in Prefect's active profile. Importing Prefect would take seconds."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect"))
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).expanduser()
    try:
        known = tomllib.loads(path.read_text("utf-8"))
        active = known["profiles"][os.environ.get("PREFECT_PROFILE") or known["active"]]
    except (OSError, ValueError, KeyError):  # there is none, or one that Prefect itself will name
        return {}
    names = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING")
    return {name: str(active[name]) for name in names if active.get(name)}


def _problem(address: str) -> str | None:
    """Why nobody answers at an address; None if somebody does."""
    try:
        with urllib.request.urlopen(address, timeout=servers.ANSWER_SECONDS):
            return None
    except HTTPError:
        return None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        # Prefect has settings of its own for certificates.
        return None if isinstance(reason, ssl.SSLError) else getattr(reason, "strerror", None) or one_line(error)


@contextmanager
def _started_again(
    server: servers.Server, serve: Callable[[], AbstractContextManager[servers.Server]]
) -> Iterator[None]:
    """Start a server again whenever it ends before the block does. Prefect's clients ask again for a minute."""
    over = threading.Event()

    def runs(server: servers.Server) -> bool:
        return not (server.has_ended or over.wait(WATCH_SECONDS))

    def watch(server: servers.Server) -> None:
        while runs(server):
            pass
        while not over.is_set():
            LOGGER.warning("Prefect's server has stopped; it is started again")
            try:
                with serve() as again:
                    while runs(again):
                        pass
            except (DitflowError, OSError) as error:
                LOGGER.warning("Prefect's server does not start: %s", one_line(error))
                over.wait(WATCH_SECONDS)

    watcher = threading.Thread(target=watch, args=(server,))
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _hide_explained_tracebacks() -> None:
    """Keep tracebacks of errors that the command prints as one line off the console; Prefect's log has them."""
    from prefect.logging.handlers import PrefectConsoleHandler

    def is_shown(record: logging.LogRecord) -> bool:
        explained = record.exc_info is not None and isinstance(record.exc_info[1], DitflowError)
        return not explained and not record.getMessage().startswith("Finished in state Failed")

    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(is_shown)


def flush_logs() -> None:
    """Let Prefect send its queued logs and events: once its server has ended it would retry for a minute."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def _warm_up(root: str) -> None:
    """Import what the run needs and open the tracking store, while the server starts."""
    import_module("flows.pipeline")
    import_module("flows.tracking.runs").prepare(root)
