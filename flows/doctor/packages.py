"""The installed packages, against the lock and against what ditflow needs."""

import platform
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import flows
from storage.finding import Finding, failed, ok, warning

LOCK = "requirements.lock"
SHOWN = 6
OF_TRAINING = ("torch", "diffusers", "numpy", "prefect", "mlflow", "zarr", "webdataset", "fsspec")
"""Packages that are named first."""


def check() -> Finding:
    """Whether each package is a version that ditflow allows (else it fails), and the one of the lock."""
    python = f"Python {platform.python_version()}"
    if missing := unmet([Requirement(line) for line in requires("ditflow") or []]):
        return failed(f"{python}; not as needed: {_shown(missing)}", "install ditflow again: pip install ditflow")
    lock = _lock()
    if lock is None:
        return ok(f"{python}; all packages as needed; no {LOCK} here to compare with")
    found, others = compared(lock)
    if others:
        seen = f"{python}; {len(others)} of {found} packages are not those of {LOCK}: {_shown(others)}"
        return warning(seen, f"pip install -r {LOCK}; others than these are not tested")
    return ok(f"{python}; {found} packages as in {LOCK}")


def unmet(requirements: list[Requirement]) -> list[str]:
    """The packages that are absent or of a version that is not allowed, each in words; those of extras are left out."""
    unmet = []
    for need in requirements:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        there = _version(need.name)
        if there is None or not need.specifier.contains(Version(there).base_version, prereleases=True):
            unmet.append(f"{need.name} {there or 'is missing'} (needs {need.specifier})")
    return unmet


def compared(lock: str) -> tuple[int, list[str]]:
    """How many packages of a lock are installed, and those of another version, each in words.

    A local version, such as ``+cpu``, is not compared.
    """
    locked = {
        canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lock.split("\n")) if pin
    }
    there = {name: found for name in locked if (found := _version(name)) is not None}
    others = [name for name, found in there.items() if Version(found).public != Version(locked[name]).public]
    others.sort(key=lambda name: name not in OF_TRAINING)
    return len(there), [f"{name} {there[name]} ({locked[name]} in the lock)" for name in others]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lock() -> str | None:
    """The lock: in the package when it was installed from a wheel, and beside it in a checkout."""
    for place in (files("flows"), Path(str(flows.__file__)).parents[1]):
        if (place / LOCK).is_file():
            return (place / LOCK).read_text("utf-8")
    return None


def _shown(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
