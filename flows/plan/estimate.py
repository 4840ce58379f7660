"""What a recipe will cost, before anything runs: each stage of the table is asked in turn, none is run."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from storage import uri
from storage.config import Config, problem
from storage.errors import InputError
from storage.estimate import PlanContext, StageCost
from storage.manifest import Manifest
from storage.rows import cache

HOUR = 3600.0


@dataclass(frozen=True)
class Reckoned:
    """A stage's own estimate."""

    stage: str
    cost: StageCost
    finished: bool
    """Whether its output is committed."""

    def line(self) -> Line:
        """The stage in the plan."""
        found = self.cost
        done = found.units if self.finished else min(found.done, found.units)
        left = 1 - done / found.units
        state = "done" if not left else f"{done:,} of {found.units:,} {found.unit}" if done else "to do"
        hours = left * found.seconds / HOUR
        return Line(self.stage, state, found.images, found.objects, found.size, round(found.size * left), hours)


def plan(recipe: Recipe, root: str, given: Mapping[str, float]) -> Plan:
    """Reckon what a recipe costs, listing its archive and measuring the rates that are not given.

    Args:
        recipe: what to run.
        root: where its outputs go.
        given: what the machine does in a second, by the names that `read_rates` knows.

    Raises:
        InputError: the archive, the autoencoder, the model or the extractor cannot be used as the recipe says.
        StorageError: a store does not answer.
    """
    rates = dict(given)
    stages = list(_reckoned(recipe, root, rates))
    lines = tuple(each.line() for each in stages)
    missing, there = sum(line.missing for line in lines), _free(root)
    memory, memory_there, copy = max(each.cost.memory for each in stages), _memory(), _copy(stages)
    return Plan(
        recipe=recipe.name,
        lines=lines,
        rates=rates,
        memory=memory,
        memory_there=memory_there,
        disk=missing,
        disk_there=there,
        copy=copy,
        problems=(*_no_disk(stages, root, missing, there), *_in_stages(stages, recipe, memory_there), *_no_room(copy)),
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


def _reckoned(recipe: Recipe, root: str, rates: dict[str, float]) -> Iterator[Reckoned]:
    """The stages that can be reckoned, in their order."""
    before: dict[str, Manifest] = {}
    launch = recipe.launch
    nodes = 1 if isinstance(launch, LocalLaunch) else launch.nodes
    for name in recipe.stages:
        stage, config = STAGES[name], recipe.config_of(name)
        definition = stage.definition
        if definition.estimate is None:
            continue
        source = before[stage.reads] if stage.reads else recipe.archive
        out = stage.output(root, config, source)
        world_size = launch.world_size if stage.ranked else 1
        found = definition.estimate(config, source, PlanContext(out, rates, world_size, nodes, before))
        made = out.committed(stage.kind)
        before[name] = made or out.manifest(stage.kind, **found.leaves)
        yield Reckoned(name, found, made is not None)


def _copy(stages: list[Reckoned]) -> Copy | None:
    """What stages copy to the cache of this machine."""
    sizes = [each.cost.copied for each in stages if not each.finished and each.cost.copied is not None]
    return Copy(str(cache.root()), sum(sizes), _room(cache.root())) if sizes else None


def _free(root: str) -> int | None:
    path = uri.local_path(root)
    return None if path is None else _room(path)


def _room(path: Path) -> int:
    """Bytes that are free where a folder lies or will lie."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _memory() -> int:
    if device().type == "cuda":
        return int(torch.cuda.get_device_properties(device()).total_memory)
    return int(psutil.virtual_memory().total)


def _no_disk(stages: list[Reckoned], root: str, disk: int, there: int | None) -> Iterator[str]:
    """Why the disk cannot hold the outputs, and what to change."""
    if there is not None and disk > there:
        change = ", or ".join(["name a larger --root", *filter(None, (each.cost.save_disk for each in stages))])
        yield f"{root}: {disk / 1e9:,.1f} GB to write, {there / 1e9:,.1f} GB are free; {change}"


def _in_stages(stages: list[Reckoned], recipe: Recipe, there: int) -> Iterator[str]:
    """What will stop a stage, and what to change."""
    ranks = recipe.launch.world_size
    for each in stages:
        found = each.cost
        if found.memory * ranks // at_once(ranks) > there:
            need = f"{found.memory / 2**30:,.1f} GiB on each of {ranks} ranks"
            yield f"{each.stage}: needs {need}, and there are {there / 2**30:,.1f} GiB; {found.save_memory}"
        yield from found.problems


def _no_room(copy: Copy | None) -> Iterator[str]:
    """Why the cache cannot hold the latents, and what to change."""
    if copy and copy.size > copy.there:
        need = f"{copy.size / 1e9:,.1f} GB of latents to copy here for training, {copy.there / 1e9:,.1f} GB are free"
        change = "set XDG_CACHE_HOME to a folder on a larger disk, or train.order=pooled with train.reading=streamed"
        yield f"{copy.folder}: {need}; {change}"
