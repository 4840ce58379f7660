"""The estimate of a recipe's cost: each stage of the table estimates its own, and none is run.

Hours follow from rates: how much this machine does in a second. Rates that are not given are measured for a few
seconds each (`dit.rates`).
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import Field, ValidationError, create_model

from dit.devices import device
from dit.export import CheckpointManifest
from dit.rates import at_once
from flows import yaml_text
from flows.contract import ENCODE_HELD_OUT, STAGES, Source
from flows.launch.spec import LocalLaunch
from flows.over_training import OverTraining
from flows.over_widths import OverWidths
from flows.plan.table import Copy, Line, Plan
from flows.recipe import Recipe
from flows.tracking.references import located
from storage import uri
from storage.config import Config, problem
from storage.errors import InputError
from storage.estimate import PlanContext, StageCost
from storage.manifest import Manifest
from storage.rows import cache
from storage.shards.shard import ShardManifest
from storage.shards.summary import summary

HOUR = 3600.0


@dataclass(frozen=True)
class StageEstimate:
    """A stage's own estimate."""

    stage: str
    """Its name, or ``encode held_out`` for images that training measures its loss on."""
    cost: StageCost
    manifest: Manifest
    """The manifest of its output, an estimate if it is not committed."""
    finished: bool
    """Whether its output is committed."""
    ranks: int
    """Ranks that share its work."""

    def line(self) -> Line:
        """The stage's line of the plan."""
        cost = self.cost
        done = cost.units if self.finished else min(cost.done, cost.units)
        left = 1 - done / cost.units
        state = "done" if not left else f"{done:,} of {cost.units:,} {cost.unit}" if done else "to do"
        hours = left * cost.seconds / HOUR
        missing, devices = round(cost.size * left), hours * self.ranks
        return Line(self.stage, state, cost.images, cost.objects, cost.size, missing, hours, devices)


def plan(recipe: Recipe, root: str, given: Mapping[str, float], price: float | None = None) -> Plan:
    """Estimate what a recipe costs: list its archive, and measure the rates that are not given.

    Args:
        recipe: the recipe.
        root: folder or URL of all outputs.
        given: speeds of the machine per second, by the names that `read_rates` accepts.
        price: of an hour of a device, which is what one rank works on.

    Raises:
        InputError: the archive, the autoencoder, the model or the extractor cannot be used as the recipe says.
        StorageError: a store does not answer.
    """
    rates = dict(given)
    stages = list(estimates(recipe, root, rates))
    lines = tuple(each.line() for each in stages)
    missing, there = sum(line.missing for line in lines), free(root)
    memory, memory_there, copy = max(each.cost.memory for each in stages), _memory(), copied(stages)
    return Plan(
        recipe=recipe.name,
        lines=lines,
        rates=rates,
        price=price,
        memory=memory,
        memory_there=memory_there,
        disk=missing,
        disk_there=there,
        copy=copy,
        archive=tuple(
            line for each in stages if isinstance(each.manifest, ShardManifest) for line in summary(each.manifest)
        ),
        guesses=tuple(f"{each.stage}: {each.cost.guess}" for each in stages if each.cost.guess and not each.finished),
        problems=(*no_disk(stages, root, missing, there), *_no_memory(stages, recipe, memory_there), *no_room(copy)),
    )


def read_rates(path: str | None) -> dict[str, float]:
    """The rates of a YAML file; none without one.

    Raises:
        InputError: it cannot be read or holds something else.
    """
    if path is None:
        return {}
    units = {name: unit for stage in STAGES.values() for name, unit in stage.definition.rates.items()}
    fields: dict[str, Any] = {name: (float | None, Field(None, gt=0, description=unit)) for name, unit in units.items()}
    try:
        values = yaml_text.parse(Path(path).read_text("utf-8"), f"--rates {path}") or {}
        return create_model("Rates", __base__=Config, **fields).model_validate(values).model_dump(exclude_none=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--rates {path}: cannot be read ({error})") from error
    except ValidationError as error:
        raise InputError(f"--rates {path}: {problem(error)}") from error


def estimates(
    recipe: Recipe, root: str, rates: dict[str, float], *, force: bool = False, checked: bool = False
) -> Iterator[StageEstimate]:
    """Check the stages that are not done; the estimates of all that have one, in the order of the pipeline.

    Args:
        recipe: the recipe.
        root: folder or URL of all outputs.
        rates: rates of a machine; those that are missing are measured and added.
        force: whether the stages will run again, into new folders.
        checked: the stages have been checked, and are not checked again.

    Raises:
        InputError: something would stop a stage.
    """
    planner = _Planner(recipe, root, rates, force, checked)
    for name in recipe.stages:
        reads = recipe.reads(name)
        source: Source = planner.before[reads] if reads else recipe.archive
        encoding = recipe.encoding_held_out(planner.before["encode"], root, force=force) if name == "train" else None
        if encoding is not None:
            held_out = planner.stage("encode", encoding.encode, planner.before["shard"], force=False)
            yield from (replace(each, stage=ENCODE_HELD_OUT) for each in held_out)
        for each in planner.stage(name, recipe.config_of(name), source, force=force):
            planner.before[name] = last = each.manifest
            yield each
        if name == "train" and recipe.over_training:
            yield from _milestones(planner, recipe.over_training)
            chosen = recipe.source(STAGES["sample"], planner.before, root)
            planner.before[name] = chosen if isinstance(chosen, Manifest) else planner.before[name]
        if name == "train" and recipe.over_widths:
            yield from _widths(planner, recipe.over_widths, last)
        if name == "average":
            planner.before["train"] = planner.before[name]


@dataclass
class _Planner:
    """Estimates one stage after the other."""

    recipe: Recipe
    root: str
    rates: dict[str, float]
    force: bool
    checked: bool
    before: dict[str, Manifest] = field(default_factory=dict)
    """Manifests of the stages so far, by name."""

    def stage(
        self, name: str, config: Config, source: Source, *, force: bool, check: bool = True
    ) -> Iterator[StageEstimate]:
        """Check a stage unless it is done; its estimate, if it has one."""
        stage, launch, config = STAGES[name], self.recipe.launch, located(config, self.root)
        nodes, definition = 1 if isinstance(launch, LocalLaunch) else launch.nodes, stage.definition
        out = stage.output(self.root, config, source, force=force)
        context = PlanContext(out, self.rates, launch.world_size if stage.ranked else 1, nodes, self.before)
        made = out.committed(stage.kind)
        if made is None and check and not self.checked:
            definition.check(config, source, context)
        if definition.estimate is not None:
            cost = definition.estimate(config, source, context)
            leaves = made or out.manifest(stage.kind, **cost.leaves)
            yield StageEstimate(name, cost, leaves, made is not None, context.world_size)


def _milestones(planner: _Planner, asked: OverTraining) -> Iterator[StageEstimate]:
    """The evaluations over training: one estimate for the samples of all steps, and one for their metrics."""
    found: dict[str, list[StageEstimate]] = {"sample": [], "evaluate": []}
    for model in _models(planner, asked):
        source = model
        for name, config in (("sample", asked.sample), ("evaluate", asked.evaluate)):
            for made in planner.stage(name, config, source, force=planner.force, check=not found[name]):  # same for all
                found[name].append(made)
                planner.before[name] = source = made.manifest
    yield from (_together(f"{name} x {len(made)}", made) for name, made in found.items())


def _widths(planner: _Planner, asked: OverWidths, trained: Manifest) -> Iterator[StageEstimate]:
    """The averages of several widths and their evaluations: one estimate for each stage of all of them."""
    found: dict[str, list[StageEstimate]] = {"average": [], "sample": [], "evaluate": []}
    for std in asked.averages:
        source = trained
        for name, config in asked.stages(std):
            check = name == "average" or not found[name]  # the others are the same for all
            for made in planner.stage(name, config, source, force=planner.force, check=check):
                found[name].append(made)
                source = made.manifest
            if name != "average":  # which would be the recipe's own
                planner.before[name] = source
    yield from (_together(f"{name} x {len(made)}", made) for name, made in found.items())


def _models(planner: _Planner, asked: OverTraining) -> Iterator[Manifest]:
    """The models over training. Once training is finished, those that it has not kept will not come."""
    latents, last = planner.before["encode"], planner.before["train"]
    assert isinstance(last, CheckpointManifest)
    kept = asked.checkpoints(planner.root, latents)
    stage, finished = STAGES["train"], asked.train.steps in kept
    for step, config in asked.configs(planner.root).items():
        if step == asked.train.steps:
            yield last
        elif step in kept:
            yield kept[step]
        elif not finished:
            out = stage.output(planner.root, config, latents)
            yield out.manifest(stage.kind, card=last.card.model_copy(update={"steps": step}))


def _together(name: str, made: list[StageEstimate]) -> StageEstimate:
    """Several estimates of one stage as one."""
    costs = [each.cost for each in made]
    done = sum(each.cost.units if each.finished else min(each.cost.done, each.cost.units) for each in made)
    cost = StageCost(
        images=sum(cost.images for cost in costs),
        objects=sum(cost.objects for cost in costs),
        size=sum(cost.size for cost in costs),
        units=sum(cost.units for cost in costs),
        done=done,
        seconds=sum(cost.seconds for cost in costs),
    )
    return StageEstimate(name, cost, made[-1].manifest, all(each.finished for each in made), made[-1].ranks)


def copied(stages: list[StageEstimate]) -> Copy | None:
    """What the stages will copy to this machine's cache."""
    sizes = [each.cost.copied for each in stages if not each.finished and each.cost.copied is not None]
    return Copy(str(cache.root()), sum(sizes), _room(cache.root())) if sizes else None


def free(root: str) -> int | None:
    """Free bytes on the disk of a root; None if it is remote or does not tell."""
    path = uri.local_path(root)
    return None if path is None else _room(path)


def _room(path: Path) -> int | None:
    """Free bytes on the disk of a folder, which need not exist yet; None if its file system does not tell."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else None


def _memory() -> int:
    if device().type == "cuda":
        return int(torch.cuda.get_device_properties(device()).total_memory)
    return int(psutil.virtual_memory().total)


def no_disk(stages: list[StageEstimate], root: str, disk: int, there: int | None) -> Iterator[str]:
    """The problem, if the outputs do not fit on the disk."""
    if there is not None and disk > there:
        change = ", or ".join(["name a larger --root", *filter(None, (each.cost.save_disk for each in stages))])
        yield f"{root}: {disk / 1e9:,.1f} GB to write, {there / 1e9:,.1f} GB are free; {change}"


def _no_memory(stages: list[StageEstimate], recipe: Recipe, there: int) -> Iterator[str]:
    """The problem of each stage that has too little memory."""
    ranks = recipe.launch.world_size
    for each in stages:
        cost = each.cost
        if cost.memory * ranks // at_once(ranks) > there:
            need = f"{cost.memory / 2**30:,.1f} GiB on each of {ranks} ranks"
            yield f"{each.stage}: needs {need}, and there are {there / 2**30:,.1f} GiB; {cost.save_memory}"


def no_room(copy: Copy | None) -> Iterator[str]:
    """The problem, if the latents do not fit into the cache."""
    if copy and copy.there is not None and copy.size > copy.there:
        need = f"{copy.size / 1e9:,.1f} GB of latents to copy here for training, {copy.there / 1e9:,.1f} GB are free"
        change = "set XDG_CACHE_HOME to a folder on a larger disk, or train.order=pooled with train.reading=streamed"
        yield f"{copy.folder}: {need}; {change}"
