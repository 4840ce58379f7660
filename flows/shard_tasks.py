"""Groups of shards as Prefect tasks, on the task runner that the config names."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.children import die_with_parent
from storage.errors import DitflowError, InputError, one_line
from storage.shards.runners import Dask, Processes, Ray, Runner, Threads
from storage.shards.shard import Build, Built, Spread

RETRY_SECONDS = [1.0, 10.0]


class TaskError(DitflowError):
    """A task failed by a fault of its own, or its worker is gone."""


def spread(runner: Runner) -> Spread:
    """Build groups of shards as tasks of the flow that runs.

    A task that fails is tried twice more, unless the input is wrong: what it has built by then stays.

    Raises, when called:
        InputError: a package or the cluster is not there, or a task found the input wrong.
        StorageError: a task could not read or write.
        TaskError: a task or its worker failed otherwise.
    """
    return partial(_spread, runner)


def _may_pass(_: Task[Any, Any], __: TaskRun, state: State[Any]) -> bool:
    return not isinstance(state.result(raise_on_failure=False), InputError)


@task(
    task_run_name="shards from {numbers.start} on",
    retries=len(RETRY_SECONDS),
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=_may_pass,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def build_shards(build: Build, numbers: range) -> Built:
    """Build a few shards."""
    return build(numbers)


def _spread(runner: Runner, build: Build, groups: Sequence[range]) -> Iterator[Built]:
    with _started(runner) as started:
        futures = [started.submit(build_shards, {"build": build, "numbers": numbers}) for numbers in groups]
        for future in futures:
            yield _result(future)


def _result(future: PrefectFuture[Built]) -> Built:
    try:
        return future.result()
    except DitflowError:
        raise
    except Exception as error:  # a worker that was killed is reported by each runner in its own way
        raise TaskError(f"shard: a task failed or lost its worker: {one_line(error)}") from error


@contextmanager
def _started(runner: Runner) -> Iterator[TaskRunner[Any]]:
    made = _task_runner(runner)
    with ExitStack() as stack:
        try:
            stack.enter_context(made)
            getattr(made, "client", None)  # Dask's connects when it is first asked for
        except Exception as error:  # what a cluster says is not of one kind
            raise InputError(f"shard.runner: {runner.kind} cannot be used: {one_line(error)}") from error
        yield made


def _task_runner(runner: Runner) -> TaskRunner[Any]:
    match runner:
        case Threads():
            return ThreadPoolTaskRunner(max_workers=runner.count or os.cpu_count())
        case Processes():
            orphans = (os.getpid(), signal.SIGKILL)
            return ProcessPoolTaskRunner(runner.count or None, initializer=die_with_parent, initargs=orphans)
        case Dask():
            here = {"n_workers": os.cpu_count(), "threads_per_worker": 1, "dashboard_address": None}
            place = {"address": runner.address} if runner.address else {"cluster_kwargs": here}
            return _extra(runner, "prefect_dask", "DaskTaskRunner", **place)
        case Ray():
            return _extra(runner, "prefect_ray", "RayTaskRunner", address=runner.address)


def _extra(runner: Dask | Ray, package: str, name: str, **options: Any) -> TaskRunner[Any]:
    try:
        started: TaskRunner[Any] = getattr(import_module(package), name)(**options)
        return started
    except ImportError as error:
        text = f"needs {package.replace('_', '-')} here and on its workers; pip install 'ditflow[{runner.kind}]'"
        raise InputError(f"shard.runner: {runner.kind} {text} ({error})") from error
