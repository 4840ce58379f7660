"""Work pools of Prefect: one for each kind of machine, each with queues by priority.

`ditflow up` serves the pool `ditflow`, whose concurrency limit is that of its machine, across all deployments. Another
pool is made by the first `ditflow worker` that serves it, with deployments of its own: ``pipeline/gpu`` runs in the
pool ``gpu``. What people set in Prefect's UI, such as limits and priorities, stays as they set it.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.contract import STAGES
from flows.prefect_client import prefect_errors
from flows.prefect_server import use_server
from flows.recipe_file import nearest
from storage import uri
from storage.errors import InputError, SubmittedError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from flows.recipe import Recipe

POOL = "ditflow"
"""The pool of `ditflow up`."""
QUEUES = ("urgent", "default", "background")
"""Of each pool, in the order of their priorities."""
AT_ONCE = 1
"""How many flows the machine of `ditflow up` runs at once, until somebody sets another limit."""


def check_name(pool: str) -> None:
    """Check that a pool can have this name. Those of flows are the names of the deployments of `ditflow up`.

    Raises:
        InputError: it cannot.
    """
    if pool in ("pipeline", *STAGES) or not re.fullmatch("[^/%&<>]+", pool):
        what = "neither the name of a flow nor a text with / % & < or > can name a pool"
        raise InputError(f"--pool {pool}: {what}; choose another, such as gpu")


def create_pool(client: "SyncPrefectClient", name: str, limit: int | None) -> None:
    """Create a work pool and its queues, as far as they are not there.

    Args:
        client: of Prefect's server.
        name: of the pool.
        limit: how many flows run in it at once, on all machines.
    """
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        made = WorkPoolCreate(name=name, type="process", base_job_template=template, concurrency_limit=limit)
        with suppress(ObjectAlreadyExists):  # another worker has just made it
            client.create_work_pool(made)
    there = {queue.name for queue in client.read_work_queues(name)}
    for priority, queue in enumerate(QUEUES, start=1):
        if queue not in there:
            with suppress(ObjectAlreadyExists):
                client.create_work_queue(queue, work_pool_name=name, priority=priority)  # others come after it


def deploy_to(client: "SyncPrefectClient", pool: str) -> None:
    """Deploy the pipeline and the stages to a pool other than `POOL`; of those that are there, renew the forms.

    The code is that of the folder in which the workers of the pool start.
    """
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
    from prefect.utilities.callables import parameter_schema

    from flows.pipeline import pipeline
    from flows.stages import stage_flow

    of_pool = DeploymentFilter(name=DeploymentFilterName(any_=[pool]))
    there = {each.flow_id: each for each in client.read_deployments(deployment_filter=of_pool)}
    modules = {"pipeline": "flows.pipeline.pipeline"} | {name: f"flows.stages.{name}" for name in STAGES}
    folder = [{"prefect.deployments.steps.set_working_directory": {"directory": str(Path.cwd())}}]
    for name, entrypoint in modules.items():
        flow = pipeline if name == "pipeline" else stage_flow(name)
        form = parameter_schema(flow)
        flow_id = client.create_flow_from_name(name)
        if flow_id in there:
            said: dict[str, Any] = {"entrypoint": entrypoint, "description": flow.description, "pull_steps": folder}
            said["parameter_openapi_schema"] = form.model_dump(exclude_unset=True)
            client.update_deployment(there[flow_id].id, DeploymentUpdate(**said))
        else:
            client.create_deployment(
                flow_id,
                pool,
                work_pool_name=pool,
                work_queue_name="default",
                entrypoint=entrypoint,
                description=flow.description,
                pull_steps=folder,
                parameter_openapi_schema=form.model_dump(exclude_unset=True),
                enforce_parameter_schema=True,
            )


def submit(recipes: "Sequence[Recipe]", options: Namespace) -> None:
    """Submit the pipelines of recipes to a work pool, or look at those that were submitted before.

    Raises:
        InputError: no server runs, or it has no such pool or queue.
        SubmittedError: always, with how many recipes are not done.
    """
    if not use_server(options.root):
        raise InputError("--pool: no Prefect server runs; start `ditflow up`, or set PREFECT_API_URL")
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    pool = options.pool
    with prefect_errors(), get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"pipeline/{'pipeline' if pool == POOL else pool}")
        except ObjectNotFound as error:
            near = nearest(pool, {each.name for each in client.read_work_pools()} - {pool})
            first = "run `ditflow deploy` first" if pool == POOL else f"start `ditflow worker --pool {pool}` first"
            raise InputError(f"--pool {pool}: nothing is deployed to this pool; {near or first}") from error
        queues = [queue.name for queue in client.read_work_queues(pool)]
        if options.queue and options.queue not in queues:
            raise InputError(f"--queue {options.queue}: the pool {pool} has {', '.join(queues)}")
        for recipe in recipes:
            last = _last_run(client, deployment.id, recipe.pipeline_id)
            state = last.state if last else None
            if state is not None and not state.is_final():
                said = state.name or state.type
            else:
                values = {"root": uri.absolute(options.root), "patience": options.patience}
                client.create_flow_run_from_deployment(
                    deployment.id,
                    name=recipe.pipeline_id,
                    tags=[recipe.pipeline_id],
                    parameters={"recipe": recipe.model_dump(mode="json"), "settings": values},
                    work_queue_name=options.queue,
                )
                said = "submitted"
                if state is not None and not state.is_completed():
                    said = f"submitted again; the last run is {': '.join(filter(None, (state.name, state.message)))}"
            sys.stderr.write(f"{recipe.name}: {said}\n")
    count = "1 recipe is" if len(recipes) == 1 else f"{len(recipes)} recipes are"
    raise SubmittedError(f"{count} in the pool {pool}; run the same command again to look")


def _last_run(client: "SyncPrefectClient", deployment: Any, pipeline_id: str) -> "FlowRun | None":
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.sorting import FlowRunSort

    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[pipeline_id])),
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=1,
    )
    return found[0] if found else None
