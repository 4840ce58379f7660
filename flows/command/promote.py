"""``ditflow promote``: make a model version the champion by hand."""

from argparse import ArgumentParser, Namespace

from flows.command.options import add_root

HELP = "make a version of a registered model the champion"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", help="name of the registered model")
    parser.add_argument("version", nargs="?", type=int, help="number of the version (default: the candidate)")
    parser.add_argument("--reason", default="", help="why; kept in the version's tags")
    add_root(parser)


def run(options: Namespace) -> None:
    """Promote the version."""
    from flows.registry.promotion import promote

    print(promote(options.model, options.version, options.reason, options.root))
