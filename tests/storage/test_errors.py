"""The one line that a person reads of somebody else's error."""

from typing import Literal

import pytest
from pydantic import ValidationError

from storage.config import Config, Problem, problem
from storage.errors import one_line


def test_one_line_without_passwords() -> None:
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("\n")) == "ValueError"
    told = one_line(OSError("\nAPI request to http://me:secret@host:5000/api failed? yes\nand more"))
    assert told == "OSError: API request to http://host:5000/api failed? yes"


class Inner(Config):
    kind: Literal["inner"] = "inner"
    side: int = 1


class Outer(Config):
    inner: Inner | list[int] = Inner()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"inner": {"kind": "inner", "side": "x"}}, "inner.side: must be a number"),
        ({"inner": {}, "other": 1}, "other: no such key"),
        ("words", "Input should be a valid dictionary or instance of Outer"),
    ],
)
def test_a_problem_names_the_key_and_no_branch_of_a_union(values: object, line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(values)
    assert str(problem(caught.value, values)).startswith(line)


def test_a_problem_of_the_values_as_a_whole_has_no_place() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate_json("{")
    place, message = problem(caught.value)
    assert (place, message.partition(":")[0]) == ("", "Invalid JSON")
    assert str(Problem(place, message)) == message
