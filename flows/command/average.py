"""``ditflow average``: a recipe's stage; or an average of any training run, with no recipe."""

from argparse import ArgumentParser, Namespace

from flows.command.options import add_running
from flows.command.prefect_server import serving_prefect
from flows.command.stage import StageCommand
from flows.contract import STAGES

STAGE = StageCommand(STAGES["average"])
HELP = STAGE.HELP


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = "recipe whose training it is; or a training run itself, by manifest, folder or MLflow run id"
    parser.add_argument("recipe", metavar="run", help=text)
    parser.add_argument("--std", type=float, metavar="WIDTH", help="relative width of the average (average.std)")
    text = "training step at which it ends (average.step; default: the last)"
    parser.add_argument("--step", type=int, metavar="STEP", help=text)
    add_running(parser)


def run(options: Namespace) -> None:
    """Make the average of a recipe's own run, or of the named one."""
    from flows.recipe import recipe_path

    given = {"std": options.std, "step": options.step}
    options.set = [*options.set, *(f"average.{name}={value}" for name, value in given.items() if value is not None)]
    if recipe_path(options.recipe).is_file():
        STAGE.run(options)
    else:
        _of_run(options)


def _of_run(options: Namespace) -> None:
    from dit.average import AverageConfig
    from flows.recipe import config_alone
    from flows.tracking import runs

    config = config_alone(AverageConfig, "average", {}, options.set)
    source = runs.resolve(options.recipe, options.root)
    STAGES["average"].source(source)
    with serving_prefect(options.root, quiet=options.json):
        from flows.command.outcomes import show
        from flows.perform import RunSettings
        from flows.stages import run_flow

        settings = RunSettings(root=options.root, force=options.force, patience=options.patience)
        given = {"checkpoint": source, "config": config}
        show(options, options.recipe, [run_flow("average", given, settings)])
