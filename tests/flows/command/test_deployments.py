"""The deployments of a Prefect server that has many."""

import pytest
from prefect.client.orchestration import get_client

from flows import prefect_client
from flows.command import deployments


@pytest.mark.usefixtures("prefect_api")
def test_deployments_are_found_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect lists so many at once, and several have the same name."""
    monkeypatch.setattr(prefect_client, "PAGE", 2)
    flows, names = [f"of {number} of many" for number in range(3)], ["one", "two"]
    with get_client(sync_client=True) as client:
        for flow in flows:
            for name in names:
                client.create_deployment(client.create_flow_from_name(flow), name)
        for flow in ("recipe", "alone"):  # `ditflow init recipe.yaml` gives a recipe the name of the flow
            client.create_deployment(client.create_flow_from_name(flow), flow)
        found = deployments._deployments(client)
    assert {f"{flow}/{name}" for flow in flows for name in names} | {"recipe/recipe", "alone"} <= found.keys()
