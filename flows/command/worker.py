"""``ditflow worker``: run flows of a work pool on this machine, until Ctrl-C.

The server is that of ``PREFECT_API_URL`` or of Prefect's active profile, else that of a running ``ditflow up`` of the
root. When the worker ends, its flows end too: training saves, and the states are set to Crashed.
"""

import os
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from flows import servers
from flows.children import GRACE_SECONDS, child, has_ended
from flows.command.deployments import prefect_command
from flows.command.options import add_root, at_least_one
from flows.command.pools import AT_ONCE, POOL, check_name, create_pool, deploy_to
from flows.command.up import list_flows, undisturbed
from flows.prefect_server import use_server
from flows.settle import end_flow_runs, open_flow_runs, settle, settled, stages_of
from flows.shares import shares
from storage import uri
from storage.errors import DitflowError, InputError, one_line

HELP = "run flows of a work pool on this machine, until Ctrl-C"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = "work pool, such as gpu, which is made if it is not there (default: %(default)s)"
    parser.add_argument("--pool", default=POOL, metavar="NAME", help=text)
    text = "take flows from this queue of the pool alone; repeatable (default: from all, by their priorities)"
    parser.add_argument("--queue", action="append", default=[], metavar="NAME", help=text)
    text = "how many flows this machine runs at once; GPUs and cores are divided among them (default: %(default)s)"
    parser.add_argument("--limit", type=at_least_one, default=1, metavar="N", help=text)
    add_root(parser)


def run(options: Namespace) -> None:
    """Serve the pool until Ctrl-C.

    Raises:
        InputError: no server is named, and none runs; or an address contains a login.
        DitflowError: the server does not answer, or the worker ends.
    """
    check_name(options.pool)
    if not use_server(options.root):
        raise InputError("worker: no Prefect server runs; set PREFECT_API_URL, or start `ditflow up` on this machine")
    os.environ["DITFLOW_ROOT"] = uri.absolute(options.root)
    if not servers.given_address("MLFLOW_TRACKING_URI"):
        sys.stderr.write("MLFLOW_TRACKING_URI is not set: MLflow's runs go to this machine's own database\n")
    from prefect.client.orchestration import get_client

    with ExitStack() as stack:
        stack.enter_context(settled(options.root, alone=False))
        with get_client(sync_client=True) as client:
            create_pool(client, options.pool, AT_ONCE if options.pool == POOL else None)
            if options.pool != POOL:
                deploy_to(client, options.pool)
        flows: list[dict[psutil.Process, str]] = [{} for _ in range(options.limit)]
        stack.callback(_report_ends, flows, options.root)
        workers = [_start(stack, options, place, part) for place, part in enumerate(shares(options.limit))]
        where = f"the pool {options.pool} of {uri.redact(os.environ['PREFECT_API_URL'].removesuffix('/api'))}"
        sys.stdout.write(f"serving  {where}\nroot     {uri.absolute(options.root)}\nCtrl-C stops.\n")
        sys.stdout.flush()
        stack.callback(undisturbed, "ending flow runs, which takes up to half a minute")
        _watch(workers, flows)


def _start(
    stack: ExitStack, options: Namespace, place: int, part: dict[str, str]
) -> tuple["subprocess.Popen[str]", Path]:
    """A worker of Prefect for one flow at a time, with its part of the machine, and its log."""
    name = f"{socket.gethostname()}-{place}"
    queues = [word for queue in options.queue for word in ("--work-queue", queue)]
    command = prefect_command("worker", "start", "--pool", options.pool, "--name", name, "--limit", "1", *queues)
    log = servers.local_home(options.root) / servers.WORKERS / f"{options.pool}-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    output = stack.enter_context(log.open("ab"))  # a second `ditflow worker` of this machine has the same
    worker = stack.enter_context(child(command, env=part | {"PREFECT_WORKER_QUERY_SECONDS": "2"}, output=output))
    return worker, log


def _watch(workers: Sequence[tuple["subprocess.Popen[str]", Path]], flows: Sequence[dict[psutil.Process, str]]) -> None:
    """Wait for the end of a worker; keep a list of the flow runs that each has started."""
    while True:
        for (worker, log), its in zip(workers, flows, strict=True):
            if has_ended(worker):
                raise DitflowError(f"a worker of Prefect ended with code {worker.poll()}; its log is {log}")
            list_flows(worker.pid, its)
        time.sleep(1)


def _report_ends(flows: Sequence[dict[psutil.Process, str]], root: str) -> None:
    """Tell Prefect and MLflow that the flow runs of this machine have ended: nothing else does once the worker has."""
    psutil.wait_procs([process for its in flows for process in its], timeout=GRACE_SECONDS + 5)
    try:
        runs = open_flow_runs(number for its in flows for number in its.values() if number)
        end_flow_runs([*runs, *stages_of(runs)], "ditflow worker has ended")
    except Exception as error:  # Prefect and its HTTP client raise exceptions of many types
        sys.stderr.write(f"Prefect does not know yet that its flow runs have ended: {one_line(error)}\n")
    settle(root, alone=False)
