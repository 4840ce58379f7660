"""``ditflow up``: the Prefect and MLflow servers, the deployments and a worker, until Ctrl-C.

Everything runs on 127.0.0.1, unless ``--host`` says otherwise, and ends with the command. When a server or the worker
dies, the command ends too; flow runs of a killed worker save a checkpoint, end, and are set to Crashed. `flows.access`
says who may reach the servers, and where they keep their data.
"""

import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import psutil

from flows import notify, servers
from flows.access import HOST, MLFLOW_PASSWORD, Access, given_access, need
from flows.children import GRACE_SECONDS, child
from flows.command.deployments import check_project, deploy, prefect_command, read_recipes
from flows.command.options import add_root, complete, preset_names
from flows.command.pools import POOL
from flows.prefect_client import all_pages
from flows.settle import end_flow_runs, open_states, settle, settled, stages_of
from flows.tracking import database
from storage import uri
from storage.errors import DitflowError, InputError, one_line
from storage.rows.cache import locked

HELP = "serve Prefect, MLflow and a worker, with all flows deployed"
PORTS = range(1, 65536)
SILENCE = 10
"""How often in a row a server may refuse a connection, asked once a second: a busy one refuses some."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = (
        "recipes that have a form each in the Prefect UI; the first one's values fill the other forms (default: demo)"
    )
    complete(parser.add_argument("--recipe", nargs="+", default=["demo"], metavar="RECIPE", help=text), preset_names)
    for server, port in (("Prefect", 4200), ("MLflow", 5000)):
        option, text = f"--{server.lower()}-port", f"port of the {server} server (default: {port})"
        parser.add_argument(option, type=int, default=port, choices=PORTS, metavar="PORT", help=text)
    text = "YAML file whose `notify` says who is told of what (see docs/how-to/notify.md)"
    parser.add_argument("--settings", type=Path, metavar="FILE", help=text)
    text = "name or address of this machine under which others reach the servers, which then need passwords and "
    text += "Postgres (see docs/how-to/people.md); default: 127.0.0.1, which others do not reach"
    parser.add_argument("--host", default=HOST, help=text)
    text = "serve Prefect and MLflow alone: nothing is deployed, and no worker runs"
    parser.add_argument("--servers-only", action="store_true", help=text)
    add_root(parser)


def run(options: Namespace) -> None:
    """Serve until Ctrl-C."""
    ports = {"prefect_port": options.prefect_port, "mlflow_port": options.mlflow_port}
    recipes = [] if options.servers_only else options.recipe
    serve(options.root, recipes, settings=options.settings, host=options.host, **ports)


def serve(
    root: str,
    recipes: Sequence[str],
    *,
    prefect_port: int,
    mlflow_port: int,
    settings: Path | None = None,
    host: str = HOST,
) -> None:
    """Start the servers, deploy all flows, start a worker, and wait; Ctrl-C or a fault stops everything.

    Args:
        root: where the flows keep their outputs.
        recipes: presets or paths of the recipes that have a form each; the first one's values fill the other forms.
            Without any the servers alone are started.
        prefect_port: port of the Prefect server.
        mlflow_port: port of the MLflow server.
        settings: file with who is told of what; None leaves that as it is.
        host: name or address of this machine under which the servers are reached.

    Raises:
        InputError: MLflow's database is half-made, the settings are wrong, a port is taken, another `ditflow up` serves
            the root, this is not the folder with prefect.yaml, or as `given_access`.
        DitflowError: a server, the worker or the deployment fails.
    """
    if recipes:
        check_project()
    for variable in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        if given := os.environ.get(variable):
            sys.stderr.write(f"{variable}={uri.redact(given)} is not used: this command starts servers of its own\n")
    told = notify.read_settings(settings) if settings else None
    access = given_access(host, new := servers.new_password())
    named = read_recipes(recipes, root)  # before the servers start, which takes longer
    if (other := servers.running(root)) is not None:
        raise InputError(f"{uri.redact(root)}: another `ditflow up` serves this root, on {other['prefect']}")
    for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
        if not servers.is_free(port, host):
            raise InputError(f"port {port} is taken; choose another with {option}")
    with ExitStack() as stack:
        home = servers.local_home(root) / "prefect"
        stack.enter_context(locked(home / "up", partial(_refuse, root)))  # until it is announced, and longer
        watched = _start(stack, root, access, prefect_port, mlflow_port)
        kept = deploy(named, root) if named else []
        if told:
            notify.apply(told)
        flows: dict[psutil.Process, str] = {}
        stack.callback(_report_ends, flows, watched[0], root, access)
        worker, log = None, home / "worker.log"
        if named:
            start = prefect_command("worker", "start", "--pool", POOL, "--name", "ditflow-up")
            output = stack.enter_context(log.open("wb"))
            worker = stack.enter_context(child(start, env={"PREFECT_WORKER_QUERY_SECONDS": "2"}, output=output))
        prefect, mlflow = (server.address for server in watched)
        env, shared = os.environ if access.mlflow else {}, access.postgres is not None
        login = env.get("MLFLOW_TRACKING_USERNAME", ""), env.get("MLFLOW_TRACKING_PASSWORD", "")
        stack.enter_context(servers.announced(root, prefect, mlflow, access.prefect, login=login, shared=shared))
        _say(root, new if access.prefect == new else "as set", prefect, mlflow, kept)
        stack.callback(undisturbed, "ending flow runs and servers, which takes up to half a minute")
        _watch(worker, flows, log, watched)


def _refuse(root: str) -> None:
    raise InputError(f"{uri.redact(root)}: another `ditflow up` starts or ends on this root; wait for it")


def _start(stack: ExitStack, root: str, access: Access, prefect_port: int, mlflow_port: int) -> list[servers.Server]:
    """Start Prefect and MLflow, let this process and its children use them, and settle what a kill has left."""
    from flows.tracking import runs

    home = servers.local_home(root)
    servers.bypass_proxy(access.host)
    os.environ |= servers.prefect_env(home / "prefect") | {"DITFLOW_ROOT": uri.absolute(root)}
    if access.postgres is None:
        database.create(home)
    elif uri.local_path(root) is None and root.startswith("s3:"):
        need("boto3", "MLflow's artifacts on S3")
    local = uri.local_path(root) is not None
    artifacts = (home / servers.MLFLOW_ARTIFACTS).as_uri() if local else uri.join(root, servers.MLFLOW_ARTIFACTS)
    serving = servers.prefect_server(
        home / "prefect", prefect_port, password=access.prefect, scheduler=True, access=access
    )
    prefect = stack.enter_context(serving)
    mlflow = stack.enter_context(servers.mlflow_server(home, mlflow_port, access=access, artifacts=artifacts))
    os.environ |= {"PREFECT_API_URL": f"{prefect.address}/api", "PREFECT_API_AUTH_STRING": access.prefect}
    os.environ["MLFLOW_TRACKING_URI"] = mlflow.address
    if access.mlflow:
        servers.use_login(*access.mlflow)
        try:
            with runs.mlflow_errors(root):
                runs.open_client(root)
        except DitflowError as error:
            remedy = f"{MLFLOW_PASSWORD} counts for a new one alone: give MLFLOW_TRACKING_USERNAME and _PASSWORD"
            user = os.environ["MLFLOW_TRACKING_USERNAME"]
            raise InputError(f"MLflow does not let {user} in ({error}); {remedy}") from error
    stack.enter_context(settled(root, alone=access.postgres is None))
    return [prefect, mlflow]


def _say(root: str, password: str, prefect: str, mlflow: str, kept: Sequence[str]) -> None:
    from flows.tracking import runs

    sys.stdout.write(f"Prefect  {prefect}\npassword {password} (Prefect's pages ask for it)\n")
    sys.stdout.write(f"MLflow   {runs.experiment_url(root) or mlflow}\nroot     {uri.absolute(root)}\n")
    if kept:
        sys.stdout.write(f"forms    as set in the UI, not by the recipe: {', '.join(kept)}\n")
    sys.stdout.write("Ctrl-C stops all.\n")
    sys.stdout.flush()


def undisturbed(said: str) -> None:
    """End in order, however often an impatient person presses Ctrl-C.

    Args:
        said: what takes its time.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # nobody may read it any more
        sys.stdout.write(f"{said}\n")
        sys.stdout.flush()


def _watch(
    worker: "subprocess.Popen[str] | None",
    flows: dict[psutil.Process, str],
    log: Path,
    watched: Sequence[servers.Server],
) -> None:
    """Wait for the end of the worker or of a server; keep a list of the flow runs that the worker has started."""
    refused: Counter[str] = Counter()
    while worker is None or worker.poll() is None:
        if worker:
            list_flows(worker.pid, flows)
        for server in watched:
            refused[server.name] = 0 if server.listens else refused[server.name] + 1
            if server.has_ended or refused[server.name] == SILENCE:
                raise DitflowError(f"{server.name} has stopped; its log is {server.log}")
        time.sleep(1)
    raise DitflowError(f"the worker ended with code {worker.returncode}; its log is {log}")


def list_flows(worker: int, flows: dict[psutil.Process, str]) -> None:
    """Keep the processes of a worker's flow runs, each with the id of its run."""
    with suppress(psutil.NoSuchProcess):
        for process in (children := psutil.Process(worker).children()):
            if not flows.get(process):
                flows[process] = ""
                with suppress(psutil.Error):  # it has just ended
                    flows[process] = process.environ().get("PREFECT__FLOW_RUN_ID", "")
        for ended in flows.keys() - set(children):
            del flows[ended]


def _report_ends(flows: Mapping[psutil.Process, str], prefect: servers.Server, root: str, access: Access) -> None:
    """Tell Prefect and MLflow that the worker's flow runs have ended: nothing else does once the worker has.

    What cannot be told now, `settle` tells at the next start.
    """
    psutil.wait_procs(list(flows), timeout=GRACE_SECONDS + 5)
    if prefect.listens:  # else it has died
        alone = access.postgres is None
        try:
            _end_flow_runs_of_the_pool(None if alone else set(flows.values()))
        except Exception as error:  # Prefect and its HTTP client raise exceptions of many types
            sys.stderr.write(f"Prefect does not know yet that its flow runs have ended: {one_line(error)}\n")
        settle(root, alone=alone)


def _end_flow_runs_of_the_pool(mine: set[str] | None) -> None:
    """End all, or those with an id of ``mine``, if workers of other machines serve the pool, too."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter, WorkPoolFilterName

    with get_client(sync_client=True) as client:
        pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
        which = FlowRunFilter(state=open_states())
        runs = all_pages(partial(client.read_flow_runs, flow_run_filter=which, work_pool_filter=pool))
        runs = [run for run in runs if mine is None or str(run.id) in mine]
    end_flow_runs([*runs, *stages_of(runs)], "ditflow up has ended")
