"""``ditflow demo``: the whole pipeline on scanned digits."""

from argparse import ArgumentParser, Namespace

from flows import servers
from flows.command import run as running
from flows.command.options import add_running

HELP = "run the whole pipeline on scanned digits"
RECIPES = ("demo", "demo-diffit", "demo-flow", "demo-milestones", "demo-scaling", "digits-0-7", "finetune-digits")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--recipe", default="demo", choices=RECIPES, help="which model (default: demo, a latent DiT)")
    add_running(parser)


def run(options: Namespace) -> None:
    """Write the digits as PNG files, and run the recipe on them."""
    from flows.demo.digits import write_digits

    write_digits(servers.local_home(options.root) / "digits")
    running.run(options)
