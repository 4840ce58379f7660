from functools import partial
from typing import Any

import pytest
from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.states import Completed
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import is_valid_schema

from flows import stages
from flows.contract import STAGES, Stage
from flows.perform import SKIPPED
from flows.pipeline import pipeline
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
    assert not reads or form[role]["description"].startswith("URL or folder of the manifest")


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


FLOWS = [*map(partial(getattr, stages), STAGES), pipeline, reevaluate]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_prefect_takes_the_schema_of_every_form(flow: Flow[..., Any]) -> None:
    """Its server reads patterns with Python's `re`, pydantic with Rust's."""
    is_valid_schema(parameter_schema(flow.fn).model_dump(), preprocess=False)
