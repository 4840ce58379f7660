from typing import Annotated, Literal

import pytest
from pydantic import Field

from storage.config import Config, is_text


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
