from functools import partial
from typing import Any

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import is_valid_schema

from flows import stages
from flows.contract import STAGES, Stage
from flows.pipeline import pipeline
from flows.reevaluate import reevaluate


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


FLOWS = [*map(partial(getattr, stages), STAGES), pipeline, reevaluate]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_prefect_takes_the_schema_of_every_form(flow: Flow[..., Any]) -> None:
    """Its server reads patterns with Python's `re`, pydantic with Rust's."""
    is_valid_schema(parameter_schema(flow.fn).model_dump(), preprocess=False)
