"""The commands of the stages, made from the table of stages."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from flows.command.options import NOT_DONE, add_recipe, add_running, check_done, check_source
from flows.contract import SOURCE, Stage
from flows.prefect_server import serving_prefect


class StageCommand:
    """The command that runs one stage of a recipe."""

    def __init__(self, stage: Stage) -> None:
        self.HELP = f"run one stage: {stage.help}"
        self._stage = stage

    def add_arguments(self, parser: ArgumentParser, *, optional: bool = False) -> None:
        """Add the recipe, which may be optional, the stage's input, and the options of a run."""
        add_recipe(parser, optional=optional)
        if self._stage.reads is not None:
            text = f"{self._stage.role}: {SOURCE} (default: the recipe's own)"
            parser.add_argument("--from", dest="source", metavar="OUTPUT", help=text)
        add_running(parser)

    def run(self, options: Namespace, changes: Sequence[str] = ()) -> None:
        """Run the stage. ``changes`` are overrides of its own config alone, not of what the recipe does beside it."""
        given = getattr(options, "source", None)
        if given is not None:
            given = check_source(self._stage, given, options.root)
        elif self._stage.reads is not None:
            check_done(self._stage.name, self._stage.reads, options.root, NOT_DONE)
        from flows.recipe import config_alone, load_recipe

        recipe = load_recipe(options.recipe, options.set, options.root)
        source = recipe.source_of(self._stage.name, given, options.root)
        config = recipe.config_of(self._stage.name)
        if changes:
            config = config_alone(type(config), self._stage.name, config.model_dump(mode="json"), changes)
        with serving_prefect(options.root, verbose=options.verbose):
            from flows.command.outcomes import show
            from flows.perform import RunSettings
            from flows.stages import run_stage

            settings = RunSettings(root=options.root, force=options.force, patience=options.patience)
            show(options, recipe.name, [run_stage(self._stage.name, recipe, source, settings, config=config)])
