"""The Prefect server of a command: that of ``PREFECT_API_URL``, else that of ``ditflow up``, else its own.

A server of its own runs for as long as the command does, and is started again when it is killed. Before it ends, the
logs that Prefect has queued are sent.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module

from flows import servers
from flows.settle import settled
from flows.tracking import database
from storage.errors import DitflowError, one_line

LOGGER = logging.getLogger(__name__)
WATCH_SECONDS = 1.0
"""How often the command looks whether its server runs."""


@contextmanager
def serving_prefect(root: str, *, quiet: bool) -> Iterator[None]:
    """Point Prefect at its server for the length of the block; start one if there is none.

    Args:
        root: folder of all outputs.
        quiet: print only warnings of Prefect, as on a terminal.

    Raises:
        InputError: MLflow's database in the root is half-made.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        database.check(servers.local_home(root))
    console = "WARNING" if quiet or sys.stderr.isatty() else "INFO"
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", console)
    given = bool(os.environ.get("PREFECT_API_URL"))
    if given or servers.use_running(root):
        import_module("flows.pipeline")
        _hide_explained_tracebacks()
        with settled(root, alone=not given):
            yield
        return
    home, port, password = servers.local_home(root) / "prefect", servers.free_port(), servers.new_password()
    address = {"PREFECT_API_URL": f"http://{servers.HOST}:{port}/api", "PREFECT_API_AUTH_STRING": password}
    os.environ |= servers.prefect_env(home) | address
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

    def is_shown(record: logging.LogRecord) -> bool:
        explained = record.exc_info is not None and isinstance(record.exc_info[1], DitflowError)
        return not explained and not record.getMessage().startswith("Finished in state Failed")

    for handler in logging.getLogger().handlers:  # Prefect adds its console handler to the root logger
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
