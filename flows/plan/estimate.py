"""The estimate of a recipe's cost: each stage of the table estimates its own, and none is run.

Hours follow from rates: how much this machine does in a second. Rates that are not given are measured for a few
seconds each (`dit.rates`).
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import Field, ValidationError, create_model

from dit.devices import device
from dit.rates import at_once
from flows import yaml_text
from flows.contract import STAGES
from flows.launch.spec import LocalLaunch
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

    def line(self) -> Line:
        """The stage's line of the plan."""
        cost = self.cost
        done = cost.units if self.finished else min(cost.done, cost.units)
        left = 1 - done / cost.units
        state = "done" if not left else f"{done:,} of {cost.units:,} {cost.unit}" if done else "to do"
        hours = left * cost.seconds / HOUR
        return Line(self.stage, state, cost.images, cost.objects, cost.size, round(cost.size * left), hours)


def plan(recipe: Recipe, root: str, given: Mapping[str, float]) -> Plan:
    """Estimate what a recipe costs: list its archive, and measure the rates that are not given.

    Args:
        recipe: the recipe.
        root: folder or URL of all outputs.
        given: speeds of the machine per second, by the names that `read_rates` accepts.

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
        memory=memory,
        memory_there=memory_there,
        disk=missing,
        disk_there=there,
        copy=copy,
        archive=tuple(
            line for each in stages if isinstance(each.manifest, ShardManifest) for line in summary(each.manifest)
        ),
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


def estimates(recipe: Recipe, root: str, rates: dict[str, float], *, force: bool = False) -> Iterator[StageEstimate]:
    """Check the stages that are not done; the estimates of all that have one, in the order of the pipeline.

    Args:
        recipe: the recipe.
        root: folder or URL of all outputs.
        rates: rates of a machine; those that are missing are measured and added.
        force: whether the stages will run again, into new folders.

    Raises:
        InputError: something would stop a stage.
    """
    before: dict[str, Manifest] = {}
    for name in recipe.stages:
        encoding = recipe.encoding_held_out(before["encode"], root, force=force) if name == "train" else None
        if encoding is not None:
            held_out = _estimate("encode", encoding, root, rates, before, force=False)
            yield from (replace(each, stage="encode held_out") for each in held_out)
        for each in _estimate(name, recipe, root, rates, before, force=force):
            before[name] = each.manifest
            yield each


def _estimate(
    name: str, recipe: Recipe, root: str, rates: dict[str, float], before: Mapping[str, Manifest], *, force: bool
) -> Iterator[StageEstimate]:
    """Check a stage if it is not done; its estimate, if it has one, from those ``before``."""
    launch, stage, config = recipe.launch, STAGES[name], located(recipe.config_of(name), root)
    nodes, definition = 1 if isinstance(launch, LocalLaunch) else launch.nodes, stage.definition
    source = before[stage.reads] if stage.reads else recipe.archive
    out = stage.output(root, config, source, force=force)
    context = PlanContext(out, rates, launch.world_size if stage.ranked else 1, nodes, before)
    made = out.committed(stage.kind)
    if made is None:
        definition.check(config, source, context)
    if definition.estimate is not None:
        cost = definition.estimate(config, source, context)
        yield StageEstimate(name, cost, made or out.manifest(stage.kind, **cost.leaves), made is not None)


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
