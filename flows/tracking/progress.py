"""Progress of a stage: a table on a terminal, lines in logs, and an artifact in Prefect, which a thread sends."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from datetime import timedelta
from threading import Thread
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext

from flows.tracking.stage_table import StageTable, duration, rate

LOGGER = logging.getLogger(__name__)
LINE_SECONDS = 10.0
"""Least time between two lines."""
LOG_SECONDS = 60.0
"""Least time between two lines in Prefect's log."""
ARTIFACT_SECONDS = 5.0
"""Least time between two updates of the artifact."""
FLUSH_SECONDS = 2.0
"""How long the end of a stage waits for the last update of the artifact."""
_tables: list[StageTable] = []
"""The table of the recipe that this process runs, if it shows one."""


@contextmanager
def stages_shown(stages: Sequence[str]) -> Iterator[None]:
    """Show the stages of a recipe in one live table for the length of the block, if somebody looks at a terminal."""
    with ExitStack() as stack:
        if sys.stderr.isatty():
            _tables.append(stack.enter_context(StageTable(stages).live()))
            stack.callback(_tables.clear)
        yield


def began(name: str) -> None:
    """Show that a stage has begun, in the table."""
    if _tables:
        _tables[0].begin(name)


def noted(name: str, text: str) -> None:
    """Show what a stage does before it can tell how far it is: in the table, or as a line."""
    if _tables:
        _tables[0].note(text)
    else:
        sys.stderr.write(f"{name}: {text}\n")


def ended(name: str, seconds: float, *, skipped: bool) -> None:
    """Show that a stage has ended: in the table, or as a line in a log."""
    said = "was done before" if skipped else f"done in {duration(seconds)}"
    if _tables:
        _tables[0].end(said)
    elif not sys.stderr.isatty():
        sys.stderr.write(f"{name}: {said}\n")


class StageProgress:
    """Shows the progress of one stage."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._table = _tables[0] if _tables else StageTable([stage])
        self._percent, self._unit = 0.0, ""
        self._sender = Thread()
        self._artifact: UUID | None = None
        self._warned = False
        self._last_line = self._last_log = self._last_artifact = time.monotonic()
        self._start: tuple[float, int] | None = None

    def note(self, text: str) -> None:
        """Show what the stage does before it can tell how far it is."""
        if sys.stderr.isatty():
            self._table.note(text)
        else:
            sys.stderr.write(f"{self._stage}: {text}\n")

    def update(self, done: int, total: int, unit: str) -> None:
        """Show ``done`` of ``total`` units. Never waits for Prefect and raises none of its errors.

        Args:
            done: units that are done.
            total: units of the whole stage.
            unit: their name; behind a comma, what else to show.
        """
        now = time.monotonic()
        pace = self._pace(now, done, total)
        self._table.update(done, total, unit, pace)
        self._percent, self._unit = min(100.0, 100.0 * done / max(total, 1)), unit.partition(",")[0]
        line = f"{done:,} of {total:,} {unit}{pace and f', {pace}'}"
        if not sys.stderr.isatty() and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            sys.stderr.write(f"{self._stage}: {line}\n")
        if FlowRunContext.get() is not None and now - self._last_log >= LOG_SECONDS:
            self._last_log = now
            get_run_logger().info(line)
        if now - self._last_artifact >= ARTIFACT_SECONDS:
            self._last_artifact = now
            self._start_sending()

    def _pace(self, now: float, done: int, total: int) -> str:
        """Rate and time left at the speed of this attempt; units that an earlier attempt did are not counted."""
        began, before = self._start = self._start or (now, done)
        seconds, worked = now - began, done - before
        if worked <= 0 or seconds <= 0:
            return ""
        left = timedelta(seconds=round(seconds * (total - done) / worked))
        return rate(worked / seconds) + (f", {left} left" if done < total else "")

    @contextmanager
    def shown(self) -> Iterator["StageProgress"]:
        """Show the progress for the length of the block."""
        with ExitStack() as stack:
            if self._table not in _tables:
                stack.enter_context(self._table.live())
                self._table.begin(self._stage)
            yield self
            if self._table not in _tables:
                self._table.end("done")
        if self._artifact is not None:
            self._sender.join(FLUSH_SECONDS)
            self._start_sending()
            self._sender.join(FLUSH_SECONDS)

    def _start_sending(self) -> None:
        """Send the artifact in a thread: Prefect's client waits minutes for a server that hangs."""
        if FlowRunContext.get() is not None and not self._sender.is_alive():
            self._sender = Thread(target=copy_context().run, args=(self._send,), name="progress", daemon=True)
            self._sender.start()

    def _send(self) -> None:
        try:
            if self._artifact is None:
                description = f"{self._unit} done"
                created = create_progress_artifact(self._percent, f"{self._stage}-progress", description)
                assert isinstance(created, UUID)
                self._artifact = created
            else:
                update_progress_artifact(self._artifact, self._percent)
        except Exception as error:  # the display must never stop the stage
            if not self._warned:
                LOGGER.warning("%s: Prefect cannot show the progress: %s", self._stage, error)
            self._warned = True
