"""``ditflow demo``: the whole pipeline on scanned digits."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from flows import servers
from flows.command import run as running
from flows.command.options import add_running, complete, preset_names

HELP = "run the whole pipeline on scanned digits"
RECIPES = ("demo", "demo-diffit", "demo-flow", "demo-milestones", "demo-scaling", "digits-0-7", "finetune-digits")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = f"which model: {', '.join(RECIPES)}, or a YAML file of your own (default: demo, a latent DiT)"
    complete(
        parser.add_argument("--recipe", default="demo", type=_of_digits, metavar="RECIPE", help=text), preset_names
    )
    add_running(parser)
    running.add_many(parser)


def run(options: Namespace) -> None:
    """Write the digits as PNG files, and run the recipe on them."""
    from flows.demo.digits import write_digits

    write_digits(servers.local_home(options.root) / "digits")
    running.run(options)


def _of_digits(name: str) -> str:
    if name not in RECIPES and not name.lower().endswith((".yaml", ".yml")):
        raise ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(RECIPES)}, or name a YAML file)")
    return name
