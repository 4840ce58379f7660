from typing import Literal

import pytest
from pydantic import Field, ValidationError

from storage.config import Config, added, flatten, operational


class Inner(Config):
    path: str | None = None
    count: int = 1


class Outer(Config):
    name: str = Field(default="a", min_length=1)
    size: Literal["S"] | int = "S"
    inner: Inner = Inner()


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


def test_a_config_becomes_flat() -> None:
    assert flatten({"a": {"b": {"c": None}}, "d": [1, "x"]}) == {"a.b.c": None, "d": [1, "x"]}


def test_a_changed_copy_is_checked_as_a_new_config() -> None:
    outer = Outer(name="b", inner=Inner(count=3))
    changed = outer.changed(size=7, inner=outer.inner.changed(path="x"))
    assert (changed.name, changed.size, changed.inner) == ("b", 7, Inner(path="x", count=3))
    assert outer.size == "S"
    assert changed.model_fields_set == {"name", "size", "inner"}
    with pytest.raises(ValidationError, match=r"name\n.*at least 1 character"):
        outer.changed(name="")
    with pytest.raises(ValidationError, match="sise"):
        outer.changed(sise=7)
    with pytest.raises(ValidationError, match="must be a number"):
        Inner().changed(count="3")
