"""Wrong input of a flow is one line: its state's message, and the error of a call."""

from typing import Any

import pytest
from prefect.client.schemas.objects import State

from flows.refusing import RefusingFlow
from storage.config import Config
from storage.errors import InputError, StorageError


class Settings(Config):
    steps: int = 1


@RefusingFlow
def work(settings: Settings) -> int:
    if settings.steps == 7:
        raise InputError("settings.steps: 7 is taken; choose another")
    if settings.steps == 8:
        raise StorageError("the disk is full")
    return settings.steps


def ended(**given: Any) -> State[Any]:
    state: State[Any] = work(**given, return_state=True)  # type: ignore[call-overload]
    return state


def test_what_is_right_is_done(prefect_api: str) -> None:
    assert work(Settings(steps=3)) == 3


def test_refused_work_is_its_line(prefect_api: str, caplog: pytest.LogCaptureFixture) -> None:
    state = ended(settings=Settings(steps=7))
    assert (state.name, state.message) == ("Failed", "settings.steps: 7 is taken; choose another")
    assert "Traceback" not in caplog.text
    with pytest.raises(InputError, match="^settings.steps: 7 is taken"):
        work(Settings(steps=7))


def test_a_refused_parameter_is_its_line(prefect_api: str) -> None:
    message = ended(settings={"steps": "many"}).message
    assert message is not None
    assert message.endswith('InputError: settings.steps: must be a number, not the text "many"')
    assert "\n" not in message


def test_a_fault_keeps_its_traceback(prefect_api: str, caplog: pytest.LogCaptureFixture) -> None:
    assert str(ended(settings=Settings(steps=8)).message).endswith("StorageError: the disk is full")
    assert "Traceback" in caplog.text
