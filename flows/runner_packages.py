"""The optional packages of some runners of shards; apart from `flows.shard_tasks`, which imports Prefect."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from storage.errors import InputError
from storage.shards.runners import Cluster, Runner

PACKAGES = {"dask": "prefect_dask", "ray": "prefect_ray"}


def check_runner(runner: Runner) -> None:
    """Check that the package of a runner is installed here, without importing it.

    Raises:
        InputError: it is not.
    """
    if isinstance(runner, Cluster) and find_spec(PACKAGES[runner.kind]) is None:
        raise InputError(_missing(runner, "not installed"))


def runner_package(runner: Cluster) -> ModuleType:
    """The package of a runner.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        return import_module(PACKAGES[runner.kind])
    except ImportError as error:
        raise InputError(_missing(runner, error)) from error


def _missing(runner: Cluster, reason: object) -> str:
    needs = f"needs {PACKAGES[runner.kind].replace('_', '-')} here and on its workers"
    return f"shard.runner: {runner.kind} {needs}; pip install 'ditflow[{runner.kind}]' ({reason})"
