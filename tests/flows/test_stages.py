import pytest
from prefect.utilities.callables import parameter_schema

from flows import stages
from flows.contract import STAGES, Stage


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
