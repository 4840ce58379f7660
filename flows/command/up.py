"""``ditflow up``: the Prefect and MLflow servers, the deployments and a worker, until Ctrl-C.

Everything runs on 127.0.0.1 and ends with the command. When a server or the worker dies, the command ends too; flow
runs of a killed worker save a checkpoint, end, and are set to Crashed.
"""

import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flows import servers
from flows.children import GRACE_SECONDS, child
from flows.command.options import add_root
from flows.settle import end_flow_runs, open_states, settle, settled
from flows.tracking import database
from storage import uri
from storage.errors import DitflowError, InputError, one_line

if TYPE_CHECKING:
    from flows.recipe import Recipe

HELP = "serve Prefect, MLflow and a worker, with all flows deployed"
PORTS = range(1, 65536)
POOL = "ditflow"
SILENCE = 10
"""How often in a row a server may refuse a connection, asked once a second: a busy one refuses some."""
PROJECT = Path("prefect.yaml")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--recipe", default="demo", help="recipe whose values fill the forms in the Prefect UI")
    for server, port in (("Prefect", 4200), ("MLflow", 5000)):
        option, text = f"--{server.lower()}-port", f"port of the {server} server (default: {port})"
        parser.add_argument(option, type=int, default=port, choices=PORTS, metavar="PORT", help=text)
    add_root(parser)


def run(options: Namespace) -> None:
    """Serve until Ctrl-C."""
    serve(options.root, options.recipe, prefect_port=options.prefect_port, mlflow_port=options.mlflow_port)


def serve(root: str, recipe: str, *, prefect_port: int, mlflow_port: int) -> None:
    """Start everything on 127.0.0.1, deploy all flows, and wait; Ctrl-C or a fault stops everything.

    Args:
        root: where the flows keep their outputs.
        recipe: the recipe whose values fill the forms in the Prefect UI.
        prefect_port: port of the Prefect server.
        mlflow_port: port of the MLflow server.

    Raises:
        InputError: MLflow's database is half-made, a port is taken, another `ditflow up` serves the root, or this is
            not the folder with prefect.yaml.
        DitflowError: a server, the worker or the deployment fails.
    """
    if not PROJECT.is_file():
        raise InputError(f"{PROJECT}: no such file here; run `ditflow up` in the folder that contains it")
    from flows.recipe import load_recipe  # imports MLflow, which takes seconds

    values = load_recipe(recipe, root=root)  # before the servers start, which takes longer
    if (other := servers.running(root)) is not None:
        raise InputError(f"{uri.redact(root)}: another `ditflow up` serves this root, on {other['prefect']}")
    for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
        if not servers.is_free(port):
            raise InputError(f"port {port} is taken; choose another with {option}")
    home, password = servers.local_home(root), servers.new_password()
    os.environ |= servers.prefect_env(home / "prefect") | {"DITFLOW_ROOT": uri.absolute(root)}
    database.create(home)
    with ExitStack() as stack:
        prefect = stack.enter_context(
            servers.prefect_server(home / "prefect", prefect_port, password=password, scheduler=True)
        )
        mlflow = stack.enter_context(servers.mlflow_server(home, mlflow_port))
        os.environ |= {"PREFECT_API_URL": f"{prefect.address}/api", "PREFECT_API_AUTH_STRING": password}
        os.environ["MLFLOW_TRACKING_URI"] = mlflow.address
        stack.enter_context(settled(root, alone=True))
        _deploy(values)
        flows: list[psutil.Process] = []
        stack.callback(_report_ends, flows, prefect_port, root)
        log = stack.enter_context((home / "prefect" / "worker.log").open("wb"))
        start = ["worker", "start", "--pool", POOL, "--name", "ditflow-up"]
        worker = stack.enter_context(child(_prefect(*start), env={"PREFECT_WORKER_QUERY_SECONDS": "2"}, output=log))
        stack.enter_context(servers.announced(root, prefect.address, mlflow.address, password))
        sys.stdout.write(f"Prefect  {prefect.address}\npassword {password} (Prefect's pages ask for it)\n")
        sys.stdout.write(f"MLflow   {mlflow.address}\nroot     {uri.absolute(root)}\nCtrl-C stops all.\n")
        sys.stdout.flush()
        _watch(worker, flows, log.name, [prefect, mlflow])


def _prefect(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", "--no-prompt", *arguments]


def _deploy(recipe: "Recipe") -> None:
    _call("work-pool", "create", POOL, "--type", "process", "--overwrite")
    _call("deploy", "--all", "--prefect-file", str(PROJECT))
    _fill_forms(recipe)


def _call(*arguments: str) -> None:
    done = subprocess.run(_prefect(*arguments), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        sys.stderr.write(f"{done.stdout}{done.stderr}\n")
        raise DitflowError(f"prefect {' '.join(arguments)} failed, as it says above")


def _fill_forms(recipe: "Recipe") -> None:
    """Fill the forms in the Prefect UI with the values of a recipe."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentUpdate

    values: dict[str, dict[str, Any]] = {
        stage: {name: value.model_dump(mode="json") for name, value in recipe.form(stage).items()}
        for stage in recipe.stages
    }
    values["reevaluate"] = {"model_name": recipe.registry.model_name}
    values["pipeline"] = values["milestones"] = {"recipe": recipe.model_dump(mode="json")}
    with get_client(sync_client=True) as client:
        for flow, parameters in values.items():
            deployment = client.read_deployment_by_name(f"{flow}/{flow}")
            client.update_deployment(deployment.id, DeploymentUpdate(parameters=parameters))


def _watch(
    worker: "subprocess.Popen[str]", flows: list[psutil.Process], log: str, watched: Sequence[servers.Server]
) -> None:
    """Wait for the end of the worker or of a server; keep a list of the flow runs that the worker has started."""
    refused: Counter[str] = Counter()
    while worker.poll() is None:
        with suppress(psutil.NoSuchProcess):
            flows[:] = psutil.Process(worker.pid).children()
        for server in watched:
            refused[server.name] = 0 if server.listens else refused[server.name] + 1
            if server.has_ended or refused[server.name] == SILENCE:
                raise DitflowError(f"{server.name} has stopped; its log is {server.log}")
        time.sleep(1)
    raise DitflowError(f"the worker ended with code {worker.returncode}; its log is {log}")


def _report_ends(flows: Sequence[psutil.Process], port: int, root: str) -> None:
    """Tell Prefect and MLflow that the worker's flow runs have ended: nothing else does once the worker has.

    What cannot be told now, `settle` tells at the next start.
    """
    psutil.wait_procs(flows, timeout=GRACE_SECONDS + 5)
    if not servers.is_free(port):  # else the server has died
        try:
            _end_flow_runs_of_the_pool()
        except Exception as error:  # Prefect and its HTTP client raise exceptions of many types
            sys.stderr.write(f"Prefect does not know yet that its flow runs have ended: {one_line(error)}\n")
        settle(root, alone=True)


def _end_flow_runs_of_the_pool() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterParentFlowRunId,
        WorkPoolFilter,
        WorkPoolFilterName,
    )

    with get_client(sync_client=True) as client:
        pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=open_states()), work_pool_filter=pool)
        of_these = FlowRunFilterParentFlowRunId(any_=[run.id for run in runs])
        runs += client.read_flow_runs(flow_run_filter=FlowRunFilter(state=open_states(), parent_flow_run_id=of_these))
    end_flow_runs(runs, "ditflow up has ended")
