from typing import Annotated, Literal

import pytest
from pydantic import Field

from storage.config import Config, added, is_text, operational


class Inner(Config):
    path: str | None = None
    count: int = 1


class Other(Config):
    count: str = ""


class Outer(Config):
    name: Annotated[str, Field(min_length=1)] = "a"
    kind: Literal["a", "b"] | None = None
    size: Literal["S"] | int = "S"
    inner: Inner | Other = Inner()
    labels: dict[str, str] = Field(default_factory=dict)
    options: dict[str, str | int] = Field(default_factory=dict)


@pytest.mark.parametrize("key", ["name", "kind", "inner.path", "labels.any"])
def test_a_field_that_holds_text_alone(key: str) -> None:
    assert is_text(Outer, key.split("."))


@pytest.mark.parametrize("key", ["size", "inner", "inner.count", "options.any", "labels", "nothing", "name.below"])
def test_a_field_that_holds_something_else(key: str) -> None:
    assert not is_text(Outer, key.split("."))


class Before(Config):
    kind: Literal["a"] = "a"
    steps: int = 1


class After(Config):
    kind: Literal["a"] = "a"
    steps: int = 1
    norm: str = added("layer")
    inner: Inner | None = added(None)
    threads: int = operational(1)


def test_an_added_field_changes_the_identity_only_with_another_value() -> None:
    assert After(threads=2).identity() == Before().identity()
    assert After(norm="rms", inner=Inner()).identity() == Before().identity() | {
        "norm": "rms",
        "inner": {"path": None, "count": 1},
    }
