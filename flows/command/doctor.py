"""``ditflow doctor``: what will go wrong on this machine."""

import json
import os
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from flows.command.options import add_json
from flows.doctor.table import CHECKS, Asked
from flows.launch.spec import LaunchSpec, LocalLaunch, NodesLaunch
from flows.prefect_server import use_profile
from flows.yaml_text import parse
from storage import uri
from storage.config import problem
from storage.errors import DitflowError, InputError
from storage.finding import State

if TYPE_CHECKING:
    from flows.doctor.examine import Result

HELP = (
    "say what will go wrong on this machine: packages, GPUs and driver, precision, compilation, speed, ranks, root and "
    "cache, servers; within a minute on a CPU, where compilation is left out, and five on a GPU"
)
WIDTH = 10
SIGNS = {"ok": "ok", "warning": "WARNING", "failed": "FAILED", "skipped": "-"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    default = os.environ.get("DITFLOW_ROOT", "runs")
    text = "folder or URL of all outputs (default: %(default)s)"
    # Not as `root`, which `main` checks before any command begins: a bad root does not stop the other checks.
    parser.add_argument("--root", dest="checked_root", metavar="ROOT", default=default, help=text)
    text = (
        "where training will run, as in a recipe, such as '{kind: nodes, nodes: 2, nproc: 8, address: \"node0:29500\"}'"
    )
    text += " on each of two machines (default: one rank for each GPU of this one)"
    parser.add_argument("--launch", default="{nproc: 0}", metavar="YAML", help=text)
    text = "run this check alone; repeatable. " + "; ".join(f"{check.name}: {check.what}" for check in CHECKS)
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", action="append", default=[], choices=names, metavar="CHECK", help=text)
    add_json(parser)


def run(options: Namespace) -> None:
    """Print what each check finds; fail if one fails."""
    from flows.doctor.examine import examine

    if not os.environ.get("PREFECT_API_URL"):
        use_profile()
    asked = Asked(options.checked_root, _launch(options.launch), named=bool(options.only))
    checks = [check for check in CHECKS if not options.only or check.name in options.only]
    states: dict[str, State] = {}
    for result in examine(asked, checks):
        print(_as_json(result) if options.json else _lines(result), flush=True)
        states[result.check.name] = result.finding.state
    failed, warnings = ([name for name, state in states.items() if state == kind] for kind in ("failed", "warning"))
    if not options.json:
        print(f"{len(failed)} failed, {len(warnings)} warnings, {len(states)} checks")
    if failed:
        raise DitflowError(f"{', '.join(failed)} failed")


def _launch(text: str) -> LocalLaunch | NodesLaunch:
    values = parse(text, "--launch")
    try:
        launch: Any = TypeAdapter(LaunchSpec).validate_python(values)
    except ValidationError as error:
        raise InputError(f"--launch: {problem(error, values)}") from error
    if isinstance(launch, LocalLaunch | NodesLaunch):
        return launch
    raise InputError("--launch: run doctor in the job itself, with kind nodes on each of its machines")


def _lines(result: "Result") -> str:
    finding = result.finding
    lines = [f"{SIGNS[finding.state]:<8} {result.check.name:<{WIDTH}}  {finding.seen}"]
    lines += [f"{'':<{WIDTH + 9}}  to do: {finding.to_do}"] if finding.to_do else []
    return "\n".join(map(uri.printable, lines))


def _as_json(result: "Result") -> str:
    values = {"check": result.check.name, **asdict(result.finding), "seconds": round(result.seconds, 2)}
    return json.dumps(values | ({"printed": result.printed} if result.printed else {}))
