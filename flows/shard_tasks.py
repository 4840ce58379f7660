"""Groups of shards as Prefect tasks, on the task runner that ``shard.runner`` names.

The shard stage plans groups of shards; `distribute` runs each group as a task, in threads, in processes or on a Dask
or Ray cluster. A task that fails is retried twice, unless the input is wrong. Shards that it has written stay.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.children import set_parent_death_signal
from flows.runner_packages import runner_package
from storage.errors import DitflowError, InputError, one_line
from storage.parallel import cores
from storage.patience import patient, seconds
from storage.shards.runners import Cluster, Runner
from storage.shards.shard import Build, BuildResult, Distribute

RETRY_SECONDS = [1.0, 10.0]


class TaskError(DitflowError):
    """A task failed with an unexpected error, or its worker died."""


def distribute(runner: Runner) -> Distribute:
    """A function that builds groups of shards as tasks of the running flow, for `storage.shards.shard.run`.

    Raises, when called:
        InputError: a package is not installed, the cluster does not answer, or a task found the input wrong.
        StorageError: a task could not read or write.
        TaskError: a task failed with an unexpected error, or its worker died.
    """
    return partial(_distribute, runner)


def _is_worth_a_retry(_: Task[Any, Any], __: TaskRun, state: State[Any]) -> bool:
    return not isinstance(state.result(raise_on_failure=False), InputError)


@task(
    task_run_name="shards from {numbers.start} on",
    retries=len(RETRY_SECONDS),
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=_is_worth_a_retry,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def build_shards(build: Build, numbers: range, patience: float) -> BuildResult:
    """Build one group of shards, with this patience for stores, in seconds."""
    with patient(patience):
        return build(numbers)


def _distribute(runner: Runner, build: Build, groups: Sequence[range]) -> Iterator[BuildResult]:
    with _started(runner) as started:
        given = {"build": build, "patience": seconds()}
        futures = [started.submit(build_shards, given | {"numbers": numbers}) for numbers in groups]
        for future in futures:
            yield _result(future)


def _result(future: PrefectFuture[BuildResult]) -> BuildResult:
    try:
        return future.result()
    except DitflowError:
        raise
    except Exception as error:  # each runner reports a killed worker with an exception of its own
        raise TaskError(f"shard: a task failed or its worker died: {one_line(error)}") from error


@contextmanager
def _started(runner: Runner) -> Iterator[TaskRunner[Any]]:
    made = _task_runner(runner)
    with ExitStack() as stack:
        try:
            stack.enter_context(made)
            getattr(made, "client", None)  # Dask connects when its client is first read
        except Exception as error:  # clusters raise exceptions of many types
            raise InputError(f"shard.runner: {runner.kind} cannot be used: {one_line(error)}") from error
        yield made


def _task_runner(runner: Runner) -> TaskRunner[Any]:
    match runner.kind:
        case "threads":
            return ThreadPoolTaskRunner(max_workers=runner.count or cores())
        case "processes":
            parent_and_signal = (os.getpid(), signal.SIGKILL)  # no worker outlives this process
            return ProcessPoolTaskRunner(
                runner.count or cores(), initializer=set_parent_death_signal, initargs=parent_and_signal
            )
        case "dask":
            here = {"n_workers": cores(), "threads_per_worker": 1, "dashboard_address": None}
            place = {"address": runner.address} if runner.address else {"cluster_kwargs": here}
            return _extra(runner, "DaskTaskRunner", **place)
        case "ray":
            return _extra(runner, "RayTaskRunner", address=runner.address)


def _extra(runner: Cluster, name: str, **options: Any) -> TaskRunner[Any]:
    started: TaskRunner[Any] = getattr(runner_package(runner), name)(**options)
    return started
