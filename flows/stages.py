"""One Prefect flow for each stage, made from the table of stages. A finished stage is skipped.

``flows.stages.<name>`` is the flow of a stage, as prefect.yaml names it. It is called by keyword, with the stage's
input by its role, with ``config`` and ``settings`` and, where ranks can share the work, with ``launcher``. It returns
the URL of its manifest. A stage that was done before ends in the state ``Skipped``.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from inspect import Parameter, Signature
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.settings.context import temporary_settings

from flows.contract import SOURCE, STAGES, Outcome, Stage
from flows.launch.spec import LaunchSpec, LocalLaunch
from flows.perform import SKIPPED, RunSettings, perform
from flows.recipe import Recipe
from flows.refusing import SUBMITTED, RefusingFlow
from flows.shard_tasks import distribute
from flows.tracking.progress import began, ended
from storage.archives.open import ArchiveRef
from storage.config import Config
from storage.errors import SubmittedError
from storage.manifest import Manifest
from storage.shards import shard as tars
from storage.shards.shard import ShardConfig

_INPUT = f"What to read: {SOURCE}".replace("`", "")
StageFlow = Flow[..., State[str]]

HERE = RunSettings()


def __getattr__(name: str) -> StageFlow:
    if name in STAGES:
        return stage_flow(name)
    raise AttributeError(name)


@cache
def stage_flow(name: str) -> StageFlow:
    """The flow of a stage."""
    stage = STAGES[name]

    def work(**given: Any) -> State[str]:
        source, settings, run = given[stage.role], given["settings"], _RUNS.get(name)
        return perform(stage, given["config"], source, settings, given.get("launcher"), run)

    about = f"{stage.help[0].upper()}{stage.help[1:]}." + (" Ranks can share the work." if stage.ranked else "")
    work.__name__ = work.__qualname__ = name
    work.__doc__ = f"{about}\n\nArgs:\n    {stage.role}: {_INPUT}." if stage.reads else about  # texts of the form
    work.__signature__ = Signature(_parameters(stage), return_annotation=State[str])  # type: ignore[attr-defined]
    return RefusingFlow(work, name=name)


def run_stage(
    name: str,
    recipe: Recipe,
    source: ArchiveRef | str,
    settings: RunSettings,
    *,
    config: Config | None = None,
    step: int | None = None,
    std: float | None = None,
) -> Outcome:
    """Run one stage of a recipe on any earlier output.

    Args:
        name: of the stage.
        recipe: the recipe.
        source: the archive, or the manifest of the stage before.
        settings: of the run.
        config: replaces the recipe's config of the stage.
        step: the training step of the milestone that the stage evaluates.
        std: the relative width of the average that the stage makes or evaluates.
    """
    which = "" if step is None else f" at step {step:,}"
    which += "" if std is None else f" of width {std:g}"
    given = recipe.form(name, config) | {STAGES[name].role: source}
    outcome = run_flow(name, given, settings, of=recipe.pipeline_id, which=which)
    return replace(outcome, step=step, std=std)


def run_flow(
    name: str, given: Mapping[str, Any], settings: RunSettings, *, of: str | None = None, which: str = ""
) -> Outcome:
    """Run the flow of a stage.

    Args:
        name: of the stage.
        given: its arguments, ``settings`` apart.
        settings: of the run.
        of: begins the name of the flow run, such as the id of the pipeline. Default: `perform` names it.
        which: follows the stage in that name.

    Raises:
        SubmittedError: the work goes on in a job for which nobody waits.
    """
    began(f"{name}{which}")
    called = f"{of} {name}{which}" if of else None
    begin, run = time.monotonic(), stage_flow(name).with_options(flow_run_name=called)
    with temporary_settings({"flows.heartbeat_frequency": None}):  # the end would wait for the thread, up to a second
        state = run(**given, settings=settings, return_state=True)
    if state.name == SUBMITTED:
        raise SubmittedError(state.message or "")
    skipped = state.name == SKIPPED
    outcome = Outcome(name, "skipped" if skipped else "ran", round(time.monotonic() - begin, 1), state.result())
    ended(f"{name}{which}", outcome.seconds, skipped=skipped)
    return outcome


def _parameters(stage: Stage) -> list[Parameter]:
    """The parameters of the flow, from which Prefect makes its form."""
    required = any(field.is_required() for field in stage.config.model_fields.values())
    parameters: list[tuple[str, Any, Any]] = [
        (stage.role, str if stage.reads else ArchiveRef, Parameter.empty),
        ("config", stage.config, Parameter.empty if required else stage.config()),
        *([("launcher", LaunchSpec, LocalLaunch())] if stage.ranked else []),
        ("settings", RunSettings, HERE),
    ]
    return [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind) for name, kind, default in parameters
    ]


def _shard_in_tasks(config: ShardConfig, archive: ArchiveRef, **output: Any) -> Manifest:
    return tars.run(config, archive, distribute=distribute(config.runner), **output)


_RUNS = {"shard": _shard_in_tasks}
"""Replacements for a stage's own ``run`` in its flow."""
