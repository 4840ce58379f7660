"""Prefect events about registered models."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID


def emit(
    event: str,
    model_name: str,
    payload: dict[str, Any],
    once: UUID | None = None,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Emit a Prefect event about a model, in the background.

    Args:
        event: its name.
        model_name: of the registered model.
        payload: facts.
        once: an id; events with the same one count once.
        labels: of the resource, which triggers can match.
    """
    from prefect.events import emit_event  # late: Prefect reads its settings when it is imported

    resource = {"prefect.resource.id": f"ditflow.model.{model_name}", "prefect.resource.name": model_name}
    resource |= labels or {}
    emit_event(event, resource, payload={"model_name": model_name} | payload, id=once)
