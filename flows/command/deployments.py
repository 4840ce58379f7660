"""The deployments of ``ditflow up``: what prefect.yaml says, beneath what people have set in Prefect's UI.

A deployment that is not there is made by ``prefect deploy``. It would replace schedules, parameters and limits of one
that is there, so of that only what the code says is renewed: entrypoint, form, texts and triggers. The forms are filled
with a recipe's values, unless a person has changed them since they were last filled.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.command.pools import AT_ONCE, POOL, create_pool
from flows.contract import STAGES
from flows.prefect_client import all_pages
from flows.recipe_file import read_values
from flows.servers import local_home
from storage import uri
from storage.errors import DitflowError, InputError
from storage.seal import json_digest

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

    from flows.recipe import Recipe

PROJECT = Path("prefect.yaml")
RECIPE = "flows.pipeline.recipe"
"""The flow that runs a recipe by its name."""
OF_RECIPES = "recipe"
"""Its name, which a recipe may have, too."""
FILLED = "forms.json"
"""File beside Prefect's database with the digest of the values that each form was filled with."""


@dataclass(frozen=True)
class Named:
    """A recipe that has a deployment, or a sweep."""

    given: str
    """Preset or path."""
    name: str
    recipe: "Recipe"
    """The first one of a sweep."""

    @property
    def tags(self) -> list[str]:
        """Words by which its deployment and runs are found."""
        train = self.recipe.train
        return ["recipe", self.name, train.model.model_dump()["kind"], train.diffusion.kind]


def read_recipes(names: Sequence[str], root: str) -> list[Named]:
    """Read the recipes to deploy.

    Args:
        names: presets or paths.
        root: where the flows keep their outputs.

    Raises:
        InputError: one of them is wrong, or two have the same name.
    """
    from flows.sweep import load_recipes  # imports torch, which takes seconds

    found = [Named(name, read_values(name, root)[0]["name"], load_recipes(name, (), root)[0]) for name in names]
    for each in found:
        if len(same := [other.given for other in found if other.name == each.name]) > 1:
            raise InputError(f"recipes {' and '.join(same)}: both have the name {each.name}; change one of them")
    return found


def deploy(recipes: Sequence[Named], root: str, *, fill: bool = True) -> list[str]:
    """Deploy every flow of `PROJECT`, and each recipe with a form of its own.

    Args:
        recipes: the recipes. The first one gives the values of all other forms.
        root: where the flows keep their outputs.
        fill: fill the other forms of deployments that were there, too.

    Returns:
        The deployments whose forms keep the values that a person has given them.

    Raises:
        DitflowError: Prefect refuses; what it says is on stderr.
    """
    from prefect.client.orchestration import get_client

    project = yaml.safe_load(PROJECT.read_text("utf-8").replace("{{ $PWD }}", str(Path.cwd())))
    wanted = {**_flows(project["deployments"]), **_recipes(project["deployments"], recipes)}
    filled = local_home(root) / "prefect" / FILLED
    with get_client(sync_client=True) as client:
        create_pool(client, POOL, AT_ONCE)
        known = _deployments(client)
        new = [name for name in wanted if name not in known]
        if new:
            _make({**project, "deployments": [wanted[name] for name in new]})
        for name in wanted.keys() - set(new):
            _renew(client, known[name], wanted[name], project["pull"])
        values = _values(recipes, root)
        todo = {name: each for name, each in values.items() if fill or name in new or "/" in name}
        return _fill_forms(client, todo, filled, new)


def check_project() -> None:
    """Check that this is the folder with `PROJECT`.

    Raises:
        InputError: it is not.
    """
    if not PROJECT.is_file():
        raise InputError(f"{PROJECT}: no such file here; run this command in the folder that contains it")


def _flows(deployments: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The deployments of `PROJECT` that have the names of their flows."""
    return {each["name"]: each for each in deployments if each["entrypoint"] != RECIPE}


def _recipes(deployments: list[dict[str, Any]], recipes: Sequence[Named]) -> dict[str, dict[str, Any]]:
    """A deployment for each recipe, like the example in `PROJECT`."""
    example = next(each for each in deployments if each["entrypoint"] == RECIPE)
    return {f"recipe/{each.name}": example | {"name": each.name, "tags": each.tags} for each in recipes}


def _make(project: Mapping[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(project, file)
        file.flush()
        _call("deploy", "--all", "--prefect-file", file.name)


def prefect_command(*arguments: str) -> list[str]:
    """Prefect's command with arguments."""
    return [sys.executable, "-m", "prefect", "--no-prompt", *arguments]


def _call(*arguments: str) -> None:
    done = subprocess.run(
        prefect_command(*arguments),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | {"PWD": str(Path.cwd())},
    )
    if done.returncode != 0:
        sys.stderr.write(f"{done.stdout}{done.stderr}\n")
        raise DitflowError(f"prefect {' '.join(arguments)} failed, as it says above")


def _deployments(client: "SyncPrefectClient") -> "dict[str, DeploymentResponse]":
    """All deployments, by flow and name, such as ``recipe/demo``; those of `PROJECT` that have their flow's by it."""
    from prefect.client.schemas.sorting import DeploymentSort

    flows = {flow.id: flow.name for flow in all_pages(client.read_flows)}
    # Several have the same name: sorted by names, pages might leave one out.
    found = all_pages(partial(client.read_deployments, sort=DeploymentSort.CREATED_DESC))
    of_each = [flows.get(each.flow_id, "") for each in found]
    return {
        flow if flow == each.name != OF_RECIPES else f"{flow}/{each.name}": each
        for flow, each in zip(of_each, found, strict=True)
    }


def _renew(
    client: "SyncPrefectClient", there: "DeploymentResponse", project: Mapping[str, Any], pull: list[dict[str, Any]]
) -> None:
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow: Flow[..., Any] = load_flow_from_entrypoint(project["entrypoint"])
    form = parameter_schema(flow).model_dump(exclude_unset=True)
    said = {"entrypoint": project["entrypoint"], "description": flow.description, "pull_steps": pull}
    client.update_deployment(there.id, DeploymentUpdate(**said, parameter_openapi_schema=form))
    for number, trigger in enumerate(project.get("triggers", ()), start=1):
        _renew_trigger(client, there, f"{there.name}__automation_{number}", trigger)


def _renew_trigger(
    client: "SyncPrefectClient", there: "DeploymentResponse", name: str, said: Mapping[str, Any]
) -> None:
    """Renew the automation that ``prefect deploy`` has made of a trigger, unless a person has removed it."""
    from prefect.events import AutomationCore, DeploymentEventTrigger

    trigger = DeploymentEventTrigger.model_validate({**said, "name": name})
    trigger.set_deployment_id(there.id)
    made = trigger.as_automation()
    for found in client.read_automations_by_name(name):
        renewed = AutomationCore(
            name=name,
            description=found.description,
            enabled=found.enabled,
            trigger=made.trigger,
            actions=made.actions,
        )
        client.update_automation(found.id, renewed)


def _values(recipes: Sequence[Named], root: str) -> dict[str, dict[str, Any]]:
    """What the forms are filled with, by deployment."""
    recipe = recipes[0].recipe
    values: dict[str, dict[str, Any]] = {
        stage: {name: value.model_dump(mode="json") for name, value in recipe.form(stage).items()}
        | ({STAGES[stage].role: _newest_input(recipe, stage)} if STAGES[stage].reads else {})
        for stage in recipe.stages
    }
    values["reevaluate"] = {"model_name": recipe.registry.model_name}
    values["pipeline"] = values["milestones"] = {"recipe": recipe.model_dump(mode="json")}
    for each in recipes:
        values[f"recipe/{each.name}"] = {"recipe": each.given, "root": uri.absolute(root)}
    return values


def _newest_input(recipe: "Recipe", stage: str) -> str:
    """What `flows.inventory.input_of` takes for the newest output of a recipe that a stage reads."""
    averaged = "average" in recipe.stages and recipe.reads(stage) == "train" and stage != "average"
    return f"{recipe.name}/average" if averaged else recipe.name


def _fill_forms(
    client: "SyncPrefectClient", values: Mapping[str, dict[str, Any]], filled: Path, new: Sequence[str]
) -> list[str]:
    from prefect.client.schemas.actions import DeploymentUpdate

    before = json.loads(filled.read_text("utf-8")) if filled.exists() else {}
    there, kept = _deployments(client), []
    for name, parameters in values.items():
        if name in before and name not in new and json_digest(there[name].parameters) != before[name]:
            kept.append(name)
        else:
            client.update_deployment(there[name].id, DeploymentUpdate(parameters=parameters))
    now = {name: json_digest(each.parameters) for name, each in _deployments(client).items()}
    digests = before | {name: now[name] for name in values if name not in kept}
    uri.write(str(filled), json.dumps(digests).encode())
    return kept
