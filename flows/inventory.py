"""The outputs of a root for people: which recipe made them, how they did, what they are called, and how to name one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from flows.contract import STAGES, Stage
from flows.processes import user
from flows.recipe_file import nearest
from flows.servers import MLFLOW_ARTIFACTS, MLFLOW_DATABASE, MLFLOW_PASSWORDS, MLFLOW_USERS, SERVERS, WORKERS
from storage import uri
from storage.errors import InputError
from storage.manifest import is_finished, key_of, output_folder
from storage.root import PINS, Facts, Output, Pin, State, outputs, pins, usage, users
from storage.verify import JOBS

_DATABASES = (file + end for file in (MLFLOW_DATABASE, MLFLOW_USERS) for end in ("", "-journal", "-shm", "-wal"))
_MLFLOW = (*_DATABASES, MLFLOW_ARTIFACTS, MLFLOW_PASSWORDS, "mlflow-server.log", "mlflow-server.lock")
_SERVERS = (*_MLFLOW, "prefect-server.log", SERVERS, "prefect", WORKERS)
OURS = frozenset([*_SERVERS, ".mlflow-being-made-.lock", "running", JOBS, "sweeps", PINS])
"""What commands, servers and launchers keep in a root beside the stages."""
SHORTEST = 4
"""Fewest digits that name an output."""
LATEST = "latest"
"""Names the newest output, whichever recipe made it."""
_COUNTED = ("images", "samples", "steps", "versions")
IN_MLFLOW = r"[0-9a-f]{32}|models:/.*"
"""A run or a registered model."""
_VARIANT = r"-[0-9a-f]{8}$"
_DIGITS = re.compile(r"(?:(\w+)/)?([0-9a-f]{1,64})")


@dataclass(frozen=True)
class Inventory:
    """All outputs of a root."""

    root: str
    outputs: Sequence[Output]
    pins: Sequence[Pin]

    @classmethod
    def of(cls, root: str) -> "Inventory":
        """Read a root.

        Raises:
            StorageError: the store does not answer, or a pin cannot be read.
        """
        return cls(root, outputs(root, OURS), pins(root))

    @cached_property
    def by_key(self) -> Mapping[str, Output]:
        """The outputs by their paths below the root."""
        return {each.key: each for each in self.outputs}

    @cached_property
    def users(self) -> Mapping[str, Sequence[Output]]:
        """What was made from each output, by its key."""
        return users(self.outputs)

    @cached_property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """The registered versions, with their aliases, of a model or registration, by digest.

        Raises:
            DitflowError: MLflow does not answer.
        """
        if not any(each.stage == "register" for each in self.outputs):
            return {}
        from flows.registry.versions import versions  # imports MLflow, which takes seconds

        named: dict[str, list[str]] = {}
        for version in versions(self.root):
            for digest in version.shown_at:
                named.setdefault(digest, []).append(str(version))
        return named

    def names(self, output: Output) -> list[str]:
        """What people call an output: registered versions, and whether it is pinned."""
        versions = self.aliases.get(output.facts.digest, ()) if output.facts else ()
        return [*versions, *("pinned" for pin in self.pins if pin.key == output.key)]

    def find(self, reference: str) -> Output:
        """The output that a reference names.

        Args:
            reference: digits of its digest, with its stage before them or not; a recipe, as `recipe_of` says or without
                the digits at its end, for its newest output, and ``recipe/stage`` for that of a stage; the same with
                ``latest`` for any recipe; its folder or manifest; an MLflow run or a registered model.

        Raises:
            InputError: there is none, or there are several.
            DitflowError: MLflow does not answer.
        """
        found = self.by_digits(reference) or self.newest(*_recipe_and_stages(reference)) or self._at(reference)
        if found is None:
            where = uri.redact(uri.absolute(self.root))
            raise InputError(f"{reference}: no such output in {where}; `ditflow ls` lists recipes, stages and digits")
        return found

    def newest(self, recipe: str, stages: Sequence[str]) -> Output | None:
        """The newest finished output of a recipe, or of any with `LATEST`: of the last of these stages that has one.

        Held-out latents, which are made beside those of training, do not count.
        """
        from storage.archives.open import HELD_OUT  # imports pyarrow

        made = [
            each
            for each in self.outputs
            if each.state is State.FINISHED
            and each.stage in stages
            and (recipe == LATEST or is_of(each, recipe))
            and not (each.facts and each.facts.config.get("split") == HELD_OUT)
        ]
        return max(made, key=lambda each: (stages.index(each.stage), created(each)), default=None)

    def by_digits(self, reference: str) -> Output | None:
        """The output whose digest begins so; None if none does.

        Raises:
            InputError: several do.
        """
        match = _DIGITS.fullmatch(reference)
        if match is None or len(match[2]) < SHORTEST:
            return None
        stage, digits = match.groups()
        found = [each for each in self.outputs if stage in (None, each.stage) and _digest(each).startswith(digits)]
        if len(found) > 1:
            few = ", ".join(each.key for each in found[:3]) + (", ..." if len(found) > 3 else "")
            raise InputError(f"{reference}: {len(found)} outputs begin so ({few}); give more digits")
        return found[0] if found else None

    def _at(self, reference: str) -> Output | None:
        if re.fullmatch(IN_MLFLOW, reference):
            from flows.tracking.runs import resolve  # imports MLflow, which takes seconds

            reference = resolve(reference, self.root)
        folder = uri.absolute(output_folder(reference))
        found = self.by_key.get(key_of(folder))
        if found is not None and found.url == folder:
            return found
        if is_finished(folder):
            raise InputError(f"{uri.redact(folder)}: not in {uri.redact(self.root)}; name its root with --root")
        return None


def input_of(stage: Stage, reference: str, root: str) -> str:
    """The manifest URL, or the folder, of what a person names as the input of a stage.

    Args:
        stage: the stage, which reads another one's output.
        reference: a recipe or ``latest``, for the newest output of the stage before, or of another one as in
            ``recipe/average``; digits; a registered model; an MLflow run; a manifest or folder, which is not read.
        root: folder of all outputs.

    Raises:
        InputError: there is no such output, or there are several.
        DitflowError: MLflow does not answer.
    """
    if re.fullmatch(IN_MLFLOW, reference):
        from flows.tracking.runs import resolve  # imports MLflow, which takes seconds

        return resolve(reference, root)
    if "://" in reference or reference.startswith(("/", ".")) or is_finished(output_folder(reference)):
        return reference
    inventory, (recipe, asked) = Inventory.of(root), _recipe_and_stages(reference)
    reads = [name for name in (stage.instead, stage.reads) if name]
    found = inventory.by_digits(reference) or inventory.newest(recipe, asked if "/" in reference else reads)
    if found is not None:
        return found.url
    before, where = " or ".join(asked if "/" in reference else reversed(reads)), uri.redact(uri.absolute(root))
    if recipe == LATEST or any(is_of(each, recipe) for each in inventory.outputs):
        raise InputError(f"{stage.role}: {reference}: no finished {before} in {where} yet; run it first")
    offer = nearest(recipe, {re.sub(_VARIANT, "", recipe_of(each)) for each in inventory.outputs})
    what = "neither a recipe with outputs nor another output"
    raise InputError(f"{stage.role}: {reference}: {what} in {where}; {offer or '`ditflow ls` lists them'}")


def _recipe_and_stages(reference: str) -> tuple[str, Sequence[str]]:
    """A recipe, and the stage that is named with it, or all in their order."""
    recipe, _, stage = reference.partition("/")
    return recipe, [stage] if stage else list(STAGES)


def created(output: Output) -> datetime:
    """When an output was finished; before all others if it is not."""
    found = output.facts.created if output.facts else None
    return found or datetime.fromtimestamp(0, UTC)


def recipe_of(output: Output) -> str:
    """The name of the recipe whose pipeline has made an output, with digits that differ if its values do.

    Empty if a stage was run alone.
    """
    return (output.facts.provenance.pipeline_id or "") if output.facts else ""


def is_of(output: Output, recipe: str) -> bool:
    """Whether a recipe has made an output, named with the digits at its end or without."""
    return (bool(recipe) and re.sub(_VARIANT, "", recipe_of(output)) == recipe) or recipe_of(output) == recipe


def number(facts: Facts) -> str:
    """The number that tells most about an output: the distance of an evaluation, the loss of a training, a count."""
    distance = (facts.distance or "").partition("[")[0].lower()
    if distance in facts.metrics:
        return f"{distance} {facts.metrics[distance]:.4g}"
    if facts.model_name is not None:
        return f"{facts.model_name}/{facts.model_version}"
    if "final_loss" in facts.metrics:
        return f"loss {facts.metrics['final_loss']:.4g}"
    return next((f"{facts.counts[name]:,} {name}" for name in _COUNTED if name in facts.counts), "")


def row(inventory: Inventory, output: Output) -> dict[str, Any]:
    """An output as a line of JSON."""
    facts, unknown = output.facts, None
    used = usage(output.url) if output.state is not State.FINISHED else None
    return {
        "output": output.key,
        "url": uri.redact(output.url),
        "digest": facts.digest if facts else unknown,
        "recipe": recipe_of(output),
        "stage": output.stage,
        "state": str(output.state),
        "fault": output.fault,
        "created": created(output).isoformat() if facts and facts.created else unknown,
        "written": _time(used.newest) if used else unknown,
        "size": used.size if used else facts.size if facts else unknown,
        "number": number(facts) if facts else "",
        "counts": facts.counts if facts else {},
        "metrics": facts.metrics if facts else {},
        "cost": facts.cost.model_dump() if facts and facts.cost else unknown,
        "names": inventory.names(output),
    }


def details(inventory: Inventory, output: Output) -> dict[str, Any]:
    """All about an output: what `row` says, its config and inputs, what lies in its folder, and who uses it."""
    facts, used = output.facts, usage(output.url)
    return row(inventory, output) | {
        "code_version": facts.code_version if facts else "",
        "inputs": {name: output.parents.get(name, digest) for name, digest in facts.inputs.items()} if facts else {},
        "config": facts.config if facts else {},
        "provenance": facts.provenance.model_dump() if facts else {},
        "on_disk": used.size,
        "objects": len(used.files),
        "used_by": [
            {"output": each.key, "recipe": recipe_of(each), "number": number(each.facts) if each.facts else ""}
            for each in inventory.users.get(output.key, ())
        ],
    }


def pinned(output: Output, reason: str) -> Pin:
    """A pin of an output by the user of this process."""
    return Pin(key=output.key, reason=reason, who=user(), when=datetime.now(UTC))


def _time(seconds: float) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat() if 0 < seconds < float("inf") else None


def _digest(output: Output) -> str:
    return output.facts.digest if output.facts else output.name
