"""``ditflow average``: a recipe's stage; or an average of any training run, with no recipe."""

from argparse import ArgumentParser, Namespace

from flows.command.options import add_running, check_names, check_source
from flows.command.stage import StageCommand
from flows.contract import STAGES
from flows.inventory import input_of
from flows.prefect_server import serving_prefect
from flows.recipe_file import recipe_path

STAGE = StageCommand(STAGES["average"])
HELP = STAGE.HELP


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = "recipe whose training it is; or a training run itself: as `--from` of the stages names it"
    parser.add_argument("run", help=text)
    parser.add_argument("--std", type=float, metavar="WIDTH", help="relative width of the average (average.std)")
    text = "training step at which it ends (average.step; default: the last)"
    parser.add_argument("--step", type=int, metavar="STEP", help=text)
    add_running(parser)


def run(options: Namespace) -> None:
    """Make the average of a recipe's own run, or of the named one."""
    given = {"std": options.std, "step": options.step}
    options.set = [*options.set, *(f"average.{name}={value}" for name, value in given.items() if value is not None)]
    if recipe_path(options.run).is_file():
        options.recipe = options.run
        check_names(options)
        STAGE.run(options)
    else:
        _of_run(options)


def _of_run(options: Namespace) -> None:
    stage = STAGES["average"]
    given = check_source(stage, options.run, options.root)
    from dit.average import AverageConfig
    from flows.recipe import config_alone

    config = config_alone(AverageConfig, "average", {}, options.set)
    source = input_of(stage, given, options.root)
    stage.source(source)
    with serving_prefect(options.root, verbose=options.verbose):
        from flows.command.outcomes import show
        from flows.perform import RunSettings
        from flows.stages import run_flow

        settings = RunSettings(root=options.root, force=options.force, patience=options.patience)
        show(options, options.run, [run_flow("average", {"checkpoint": source, "config": config}, settings)])
