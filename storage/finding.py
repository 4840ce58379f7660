"""What one check of ``ditflow doctor`` has found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """A result in words, each of one line."""

    state: State
    """``warning``: it works, but not well. ``skipped``: there is nothing to check here."""
    seen: str
    to_do: str = ""
    """The remedy; empty if there is nothing to do."""


def ok(seen: str) -> Finding:
    """All is well."""
    return Finding("ok", seen)


def warning(seen: str, to_do: str) -> Finding:
    """It works, but not well."""
    return Finding("warning", seen, to_do)


def failed(seen: str, to_do: str) -> Finding:
    """It does not work."""
    return Finding("failed", seen, to_do)


def skipped(seen: str) -> Finding:
    """There is nothing to check."""
    return Finding("skipped", seen)
