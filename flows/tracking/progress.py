"""Progress of a stage: a bar on a terminal, lines in a log, and an artifact in Prefect, which a thread sends."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from datetime import timedelta
from threading import Thread
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

LOGGER = logging.getLogger(__name__)
LINE_SECONDS = 10.0
"""Least time between two lines."""
ARTIFACT_SECONDS = 5.0
"""Least time between two updates of the artifact."""
FLUSH_SECONDS = 2.0
"""How long the end of a stage waits for the last update of the artifact."""


class StageProgress:
    """Shows the progress of one stage."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bar = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None
        self._percent, self._unit = 0.0, ""
        self._sender = Thread()
        self._artifact: UUID | None = None
        self._warned = False
        self._last_line = self._last_artifact = time.monotonic()
        self._start: tuple[float, int] | None = None

    def update(self, done: int, total: int, unit: str) -> None:
        """Show ``done`` of ``total`` units. Never waits for Prefect and raises none of its errors."""
        now = time.monotonic()
        left = self._left(now, done, total)
        if self._task is None:
            self._task = self._bar.add_task(self._stage, total=total, unit=unit, left=left)
        self._bar.update(self._task, completed=done, total=total, unit=unit, left=left)
        self._percent, self._unit = min(100.0, 100.0 * done / max(total, 1)), unit
        if self._bar.disable and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            sys.stderr.write(f"{self._stage}: {done:,} of {total:,} {unit}{left and f', {left}'}\n")
        if now - self._last_artifact >= ARTIFACT_SECONDS:
            self._last_artifact = now
            self._start_sending()

    def _left(self, now: float, done: int, total: int) -> str:
        """The time left at the speed of this attempt; units that an earlier attempt did are not counted."""
        began, before = self._start = self._start or (now, done)
        if done <= before or done >= total:
            return ""
        return f"{timedelta(seconds=round((now - began) * (total - done) / (done - before)))} left"

    @contextmanager
    def shown(self) -> Iterator["StageProgress"]:
        """Show the progress for the length of the block."""
        with self._bar:
            yield self
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
