"""The live table of a recipe's stages on a terminal: a line for each, with bar, rate, time left, and its end."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class StageTable:
    """A line for each stage of a recipe.

    Args:
        stages: their names, in the order in which they will run. Others may be added by `begin`.
    """

    def __init__(self, stages: Sequence[str]) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.fields[counted]}", justify="right"),
            TextColumn("{task.fields[said]}"),
            console=self._console,
            disable=not sys.stderr.isatty(),
            redirect_stdout=False,
        )
        self._waiting = {name: self._add(name) for name in stages}
        self._current: TaskID | None = None
        self._counted = ""

    @contextmanager
    def live(self) -> Iterator["StageTable"]:
        """Show the table for the length of the block. What is logged meanwhile comes above it."""
        consoles = [handler for handler in logging.getLogger().handlers if isinstance(_console_of(handler), Console)]
        before = [_console_of(handler) for handler in consoles]
        try:
            with self._bars:
                for handler in consoles:
                    handler.console = self._console  # type: ignore[attr-defined]
                try:
                    yield self
                finally:
                    for task in self._waiting.values():  # those that did not run, after a fault
                        self._bars.remove_task(task)
        finally:
            for handler, console in zip(consoles, before, strict=True):
                handler.console = console  # type: ignore[attr-defined]

    def begin(self, name: str) -> None:
        """Begin a stage, the next one of this name in the table, or one that is not there yet."""
        found = self._waiting.pop(name, None)
        self._current = self._add(name) if found is None else found
        self._counted = ""
        self._bars.update(self._current, said="starting")

    def note(self, text: str) -> None:
        """Say what the stage does before it can tell how far it is."""
        if self._current is not None:
            self._bars.update(self._current, said=text)

    def update(self, done: int, total: int, unit: str, pace: str) -> None:
        """Show how far the stage is."""
        if self._current is not None:
            self._counted = f"{total:,} {unit}"
            self._bars.update(
                self._current, completed=done, total=total or 1, counted=f"{done:,}/{total:,} {unit}", said=pace
            )

    def end(self, said: str) -> None:
        """Let the stage's line say that it has ended, and how."""
        if self._current is not None:
            self._bars.update(self._current, completed=1, total=1, counted=self._counted, said=said)
            self._current = None

    def _add(self, name: str) -> TaskID:
        return self._bars.add_task(name, total=1, counted="", said="")


def duration(seconds: float) -> str:
    """Such as ``3.2 s`` or ``1:02:03``."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def rate(per_second: float) -> str:
    """Such as ``3.21/s`` or, of slow work, ``12.3/min``."""
    return f"{per_second:,.3g}/s" if per_second >= 1 else f"{60 * per_second:,.3g}/min"


def _console_of(handler: logging.Handler) -> object:
    return getattr(handler, "console", None)
