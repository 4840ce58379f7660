"""Progress of a stage: a bar on a terminal, plain lines elsewhere, an artifact in Prefect."""

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
ARTIFACT_SECONDS = 5.0
LAST_SECONDS = 2.0  # how long the end of a stage waits for Prefect to take its last artifact


class StageProgress:
    """Shows how far one stage is, wherever somebody may look."""

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
        self._told = False
        self._last_line = self._last_artifact = time.monotonic()
        self._first: tuple[float, int] | None = None

    def update(self, done: int, total: int, unit: str) -> None:
        """Show ``done`` of ``total`` units. Never raises for want of Prefect, and never waits for it."""
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
        """The time left at the pace of this attempt: what an earlier one did took this one no time."""
        began, before = self._first = self._first or (now, done)
        if done <= before or done >= total:
            return ""
        return f"{timedelta(seconds=round((now - began) * (total - done) / (done - before)))} left"

    @contextmanager
    def shown(self) -> Iterator["StageProgress"]:
        """Show the progress for the length of the block."""
        with self._bar:
            yield self
        if self._artifact is not None:
            self._sender.join(LAST_SECONDS)
            self._start_sending()
            self._sender.join(LAST_SECONDS)

    def _start_sending(self) -> None:
        """Send the artifact in the background: its client waits minutes for a server that hangs."""
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
        except Exception as error:  # a picture of the work must never stop the work
            if not self._told:
                LOGGER.warning("%s: Prefect does not show the progress: %s", self._stage, error)
            self._told = True
