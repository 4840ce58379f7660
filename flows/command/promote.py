"""``ditflow promote``: make a model version the champion by hand."""

import os
from argparse import ArgumentParser, Namespace

from flows import servers
from flows.command.options import add_root, complete
from flows.prefect_server import flush_logs
from flows.recipe_file import nearest
from flows.tracking import database
from storage import uri
from storage.errors import InputError

HELP = "make a version of a registered model the champion"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    complete(parser.add_argument("model", help="name of the registered model"), _models)
    parser.add_argument("version", nargs="?", type=int, help="number of the version (default: the candidate)")
    parser.add_argument("--reason", default="", help="why; kept in the version's tags")
    add_root(parser)


def run(options: Namespace) -> None:
    """Promote the version."""
    servers.given_address("PREFECT_API_URL")  # refused before anything is promoted
    if not servers.given_address("MLFLOW_TRACKING_URI"):
        _check(options.model, options.version, options.root)
    servers.use_running(options.root)
    from flows.registry.promotion import promote  # imports Prefect, which reads its settings then

    print(promote(options.model, options.version, options.reason, options.root))
    if os.environ.get("PREFECT_API_URL"):
        flush_logs()


def _models(parsed_args: Namespace, **_: object) -> list[str]:
    return list(database.registered(servers.local_home(parsed_args.root)) or {})


def _check(model: str, version: int | None, root: str) -> None:
    """Refuse a model or version that the root's own database does not have, without MLflow's seconds."""
    known = database.registered(servers.local_home(root))
    if known is None:
        return
    if model not in known:
        near = nearest(model, known) or f"there are: {', '.join(sorted(known)) or 'none'}"
        raise InputError(f"{model}: no such registered model below {uri.redact(root)}; {near}")
    if version is not None and version not in known[model]:
        there = ", ".join(map(str, known[model])) or "none"
        raise InputError(f"{model}: has no version {version}; there are: {there}")
