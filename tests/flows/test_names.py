"""What Prefect made up is replaced, and what a person typed is not."""

from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.utilities.names import generate_slug

from flows.names import is_made_up, named

OF_FORMS = ("alpha3-andromedae", "tau-canis-majoris-void", "omega17-ursae-majoris", "Awesome-arepas", "Handmade-tacos")
TYPED = ("baseline", "my-run", "first-try", "lr 0.01", "long-training-run", "beta", "demo-1a2b3c4d train", "small-test")


def test_the_names_that_prefect_makes_up_are_known() -> None:
    made_up = [*OF_FORMS, *(generate_slug(2) for _ in range(200))]
    assert [name for name in made_up if not is_made_up(name)] == []
    assert [name for name in TYPED if is_made_up(name)] == []


@flow
def work() -> tuple[str, str]:
    return str(flow_run.id), named("demo-1a2b3c4d train")


@pytest.mark.parametrize("typed", [None, "my baseline"])
def test_a_typed_name_stays(prefect_api: str, typed: str | None) -> None:
    run, name = work.with_options(flow_run_name=typed)()
    assert name == (typed or "demo-1a2b3c4d train")
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(UUID(run)).name == name


def test_outside_a_flow_run_there_is_nothing_to_name() -> None:
    assert named("train") == "train"
