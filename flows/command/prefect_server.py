"""The Prefect server that a command talks to."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from flows import servers
from storage.errors import DitflowError


@contextmanager
def serving_prefect(root: str, *, quiet: bool) -> Iterator[None]:
    """A Prefect server for the length of the block: the user's, that of ``ditflow up``, or our own.

    Args:
        root: folder of all outputs.
        quiet: show warnings of Prefect's alone, as on a terminal.
    """
    console = "WARNING" if quiet or sys.stderr.isatty() else "INFO"
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", console)
    if os.environ.get("PREFECT_API_URL") or servers.use_running(root):
        import_module("flows.pipeline")
        _quiet_what_we_explain()
        yield
        return
    home, port = servers.local_home(root) / "prefect", servers.free_port()
    os.environ |= servers.prefect_env(home) | {"PREFECT_API_URL": f"http://{servers.HOST}:{port}/api"}
    warm = threading.Thread(target=_warm, args=(root,))
    warm.start()
    try:
        with servers.prefect_server(home, port):
            warm.join()
            _quiet_what_we_explain()
            try:
                yield
            finally:
                send_last_words()
    finally:
        warm.join()


def _quiet_what_we_explain() -> None:
    """Keep Prefect's tracebacks of errors that end as one line of ours off the console; its log has them."""

    def wanted(record: logging.LogRecord) -> bool:
        explained = record.exc_info is not None and isinstance(record.exc_info[1], DitflowError)
        return not explained and not record.getMessage().startswith("Finished in state Failed")

    for handler in logging.getLogger().handlers:  # Prefect puts its console on the root logger
        handler.addFilter(wanted)


def send_last_words() -> None:
    """Let Prefect send what it still holds: it would try for a minute once its server is gone."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def _warm(root: str) -> None:
    """Import what the run needs and open the tracking store, while the server starts."""
    import_module("flows.pipeline")
    import_module("flows.tracking.runs").prepare(root)
