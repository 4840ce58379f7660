"""Runs that a kill left open in Prefect and MLflow are ended by the next command on the root, and by ``ditflow up``."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from flows import processes
from flows.prefect_client import all_pages, prefect_errors
from flows.processes import Processes
from storage.errors import DitflowError, one_line

if TYPE_CHECKING:
    from prefect.client.schemas.filters import FlowRunFilterState
    from prefect.client.schemas.objects import FlowRun

LOGGER = logging.getLogger(__name__)


@contextmanager
def settled(root: str, *, alone: bool) -> Iterator[None]:
    """For the length of the block, in which this process runs flows, be a process of the root; `settle` before.

    Raises:
        DitflowError: a person has deleted a flow, or a flow run, that the block was running; or Prefect's server
            refuses, or does not answer any more.
    """
    from httpx import RequestError
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError  # late: Prefect reads its settings then

    if processes.join(root):  # else the locks tell of nobody whether he lives
        settle(root, alone=alone)
    told = True
    try:
        with prefect_errors():
            yield
    except ObjectNotFound as error:
        what = "a flow or a flow run of this command was deleted while it ran"
        raise DitflowError(f"Prefect: {what}; run the same command again to continue") from error
    except DitflowError as error:
        told = not isinstance(error.__cause__, RequestError | PrefectHTTPStatusError)
        raise
    finally:
        processes.leave(root, told=told)


def settle(root: str, *, alone: bool) -> None:
    """End what belongs to killed processes of a root: as Crashed in Prefect, as KILLED in MLflow.

    Call it when this process has joined the root; with ``alone`` before it runs a flow. An error is only logged, and
    the next command tries again.

    Args:
        root: folder of all outputs.
        alone: whether Prefect's server has the flow runs of this root alone. Then those of no known process are
            ended too, if no other process of the root lives.
    """
    try:
        found = open_flow_runs() if alone else []  # first: a process joins before it runs a flow
        _settle(root, found, processes.others(root), alone=alone)
    except Exception as error:  # Prefect, its HTTP client and MLflow raise exceptions of many types
        LOGGER.warning("runs that a kill left open cannot be settled now: %s", one_line(error))


def _settle(root: str, found: "list[FlowRun]", them: Processes, *, alone: bool) -> None:
    killed = {run for runs in them.killed.values() for run in runs}
    if not alone and killed:
        found = open_flow_runs(killed)
    nobody_else = alone and not them.living
    end_flow_runs([run for run in found if nobody_else or str(run.id) in killed], "its process was killed")
    if them.killed:
        from flows.tracking.runs import end_killed  # takes seconds

        end_killed([path.name for path in them.killed], root)
    for path in them.killed:
        processes.forget(root, path)


def end_flow_runs(runs: "Iterable[FlowRun]", why: str) -> None:
    """Tell Prefect that flow runs have ended: as Cancelled those that a person was cancelling, else as Crashed.

    Their places among the runs of a deployment become free.
    """
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled, Crashed

    with get_client(sync_client=True) as client:
        for run in runs:
            cancelling = run.state is not None and run.state.is_cancelling()
            client.set_flow_run_state(run.id, Cancelled() if cancelling else Crashed(message=why), force=True)


def open_states() -> "FlowRunFilterState":
    """Selects the flow runs that have begun and not ended."""
    from prefect.client.schemas.filters import FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    begun = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=begun))


def stages_of(runs: "Sequence[FlowRun]") -> "list[FlowRun]":
    """The open flow runs within others."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

    within = FlowRunFilterParentFlowRunId(any_=[run.id for run in runs])
    with get_client(sync_client=True) as client:
        which = FlowRunFilter(state=open_states(), parent_flow_run_id=within)
        return all_pages(partial(client.read_flow_runs, flow_run_filter=which))


def open_flow_runs(ids: Iterable[str] | None = None) -> "list[FlowRun]":
    """The open flow runs, or those of them with one of the ids."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    these = None if ids is None else FlowRunFilterId(any_=[UUID(run) for run in ids])
    which = FlowRunFilter(state=open_states(), id=these)
    with get_client(sync_client=True) as client:
        return all_pages(partial(client.read_flow_runs, flow_run_filter=which))
