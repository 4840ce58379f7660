import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.states import Completed
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import is_valid_schema

from dit.samplers.config import SampleConfig
from dit.samplers.table import SAMPLERS
from flows import stages
from flows.contract import STAGES, Stage
from flows.milestones import milestones
from flows.perform import SKIPPED
from flows.pipeline import pipeline, recipe
from flows.reevaluate import reevaluate
from storage.archives.open import ArchiveRef
from storage.shards.shard import ShardConfig


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_the_form_of_a_stage_explains_itself(stage: Stage) -> None:
    name, reads, role = stage.name, stage.reads, stage.role
    flow = getattr(stages, name)
    form = parameter_schema(flow.fn).properties
    assert flow.name == name
    assert "Args" not in flow.description
    assert list(form)[:2] == [role, "config"]
    assert not reads or form[role]["description"].startswith("What to read: a recipe's name or latest")


def test_what_is_no_stage_is_not_there() -> None:
    with pytest.raises(AttributeError):
        stages.nothing  # noqa: B018


def test_the_end_of_a_stage_waits_for_no_heartbeat(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's thread for it sleeps for a second at a time, and the end of a flow run waits for the thread."""
    asked = list[int | None]()

    def perform(*_: object) -> State[str]:
        asked.append(get_current_settings().flows.heartbeat_frequency)
        return Completed(name=SKIPPED, data="made")

    monkeypatch.setattr(stages, "perform", perform)
    before = get_current_settings()
    given = {"archive": ArchiveRef(train="nowhere"), "config": ShardConfig()}
    assert stages.run_flow("shard", given, stages.HERE).manifest == "made"
    assert asked == [None]
    assert get_current_settings() == before
    assert before.flows.heartbeat_frequency is not None  # of a deployment's own flow run


FLOWS = [*map(partial(getattr, stages), STAGES), recipe, pipeline, milestones, reevaluate]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_prefect_takes_the_schema_of_every_form(flow: Flow[..., Any]) -> None:
    """Its server reads patterns with Python's `re`, pydantic with Rust's."""
    is_valid_schema(parameter_schema(flow.fn).model_dump(), preprocess=False)


def fields(schema: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All fields of a form with their names."""
    if isinstance(schema, dict):
        if name:
            yield name, schema
        for key, value in schema.items():
            if key == "properties":
                for field, each in value.items():
                    yield from fields(each, field)
            elif key not in ("default", "$defs"):
                yield from fields(value)
    elif isinstance(schema, list):
        for each in schema:
            yield from fields(each)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_fields_have_their_own_names_and_plain_texts_in_a_kept_order(flow: Flow[..., Any]) -> None:
    form = parameter_schema(flow.fn).model_dump(exclude_unset=True)
    found = list(fields(form))
    assert [field for name, field in found if field["title"] != name or "position" not in field] == []
    assert "``" not in json.dumps(form)
    assert [name for name, field in found if "const" in field] == []  # would be a text box
    kinds = [field for name, field in found if name == "kind"]
    assert [kind for kind in kinds if kind["position"] or kind["default"] != kind["enum"][0]] == []
    for definition in form.get("definitions", {}).values():
        places = [field["position"] for field in definition["properties"].values()]
        assert places == list(range(len(places)))


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_a_filled_form_opens_at_what_it_is_filled_with(flow: Flow[..., Any]) -> None:
    """Prefect's UI opens the first choice that has the most fields of the value."""
    form = parameter_schema(flow.fn).model_dump(exclude_unset=True)
    definitions = form.get("definitions", {})
    for _, field in fields(form):
        named = [each["$ref"].rpartition("/")[2] for each in field.get("anyOf", []) if "$ref" in each]
        choices = [set(definitions[name].get("properties", {})) for name in named]
        for place, choice in enumerate(choices):
            assert not any(choice <= earlier for earlier in choices[:place]), named


def test_what_only_some_samplers_use_says_so() -> None:
    for (_, name), row in SAMPLERS.items():
        for field in row.fields:
            users = {other for (_, other), each in SAMPLERS.items() if field in each.fields}
            said = str(SampleConfig.model_fields[field].description)
            others = {other for _, other in SAMPLERS} - users
            assert not others or name in said or "Not used by" in said or "For flows" in said, field


def test_a_recipe_has_a_short_form() -> None:
    form = parameter_schema(recipe.fn).model_dump(exclude_unset=True)
    assert list(form["properties"]) == ["recipe", "set", "launch", "root"]
    assert form["required"] == ["recipe"]
