"""The base class of every config: immutable, strict, with an identity that enters a stage's digest."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from storage import uri

Location = Annotated[str, AfterValidator(uri.checked)]
"""A path or fsspec URL, which holds no secret, since configs are shown and stored openly."""

_MESSAGES = {"extra_forbidden": "no such key", "union_tag_not_found": "say which with `kind`"}


class Config(BaseModel):
    """An immutable pydantic model that refuses unknown keys.

    The same class validates the YAML and is the form in the Prefect UI. The docstring of each field is
    its help text, with the unit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        """Refuse what pydantic would turn into another type: text or a truth value in a number's place, and so on."""
        for name, kinds in _numbers(cls).items() if isinstance(values, dict) else ():
            value = values.get(name)
            expected = _other_type(value, kinds)
            if expected:
                said = f"must be {expected}, not {'the text ' * isinstance(value, str)}{json.dumps(value)}"
                error = PydanticCustomError("as_written", "{said}", {"said": said})
                raise ValidationError.from_exception_data(
                    cls.__name__, [{"type": error, "loc": (name,), "input": value}]
                )
        return values

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The form in the Prefect UI: fields have their own names, and places, since a database may lose their order.

        The field ``kind`` comes first, and is the name of the whole. What has one value is a choice of one, filled in.
        """
        reference = handler(core_schema)
        made = handler.resolve_ref_schema(reference)
        fields = made.get("properties", {})
        for name, field in fields.items():
            if "const" in field:  # would be a text box
                field |= {"default": field["const"], "enum": [field.pop("const")]}
                made["title"] = field["default"] if name == "kind" else made["title"]
            if "oneOf" in field:  # which the older of Prefect's two user interfaces does not know
                field["anyOf"] = field.pop("oneOf")
        names = sorted(fields, key=lambda name: bool(name != "kind"))
        made["properties"] = {name: fields[name] | {"title": name, "position": at} for at, name in enumerate(names)}
        for each in (made, *made["properties"].values()):
            if "description" in each:
                each["description"] = each["description"].replace("``", "")
        return reference

    def changed(self, **fields: Any) -> Self:
        """A copy with other values of some fields, which are checked as those of a new config.

        Raises:
            ValidationError: a field does not exist, or the values do not fit each other.

        Examples:
            >>> class Crop(Config):
            ...     side: int
            ...     flips: bool = False
            >>> Crop(side=32).changed(flips=True)
            Crop(side=32, flips=True)
        """
        return self.model_validate({name: getattr(self, name) for name in self.model_fields_set} | fields)

    def identity(self) -> dict[str, Any]:
        """The JSON values that determine the stage's output.

        Operational fields are left out, and so are fields of later versions that have their default.

        Examples:
            >>> class Encode(Config):
            ...     resolution: int
            ...     threads: int = operational(1)
            ...     rounding: str = added("nearest")
            >>> Encode(resolution=256, threads=8).identity()
            {'resolution': 256}
        """

        def left_out(field: FieldInfo, value: Any) -> bool:
            return _is(field, "operational") or (_is(field, "added") and value == field.default)

        return dict(_selected(self, left_out))

    def stable_values(self) -> dict[str, Any]:
        """The JSON values of all fields, but for operational ones and those of later versions that have their default.

        So another version, which has more of them, gives the same values.
        """

        def left_out(field: FieldInfo, value: Any) -> bool:
            return (_is(field, "operational") or _is(field, "added")) and value == field.default

        return dict(_selected(self, left_out))


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """A field that does not change a stage's output and is left out of its digest: workers, batch sizes, locations.

    Locations are not part of the identity; their contents enter the digest by hash.
    """
    extra: dict[str, Any] | Callable[..., None] = {"operational": True}
    return Field(default, json_schema_extra=extra, **kwargs)


def added(default: Any, **kwargs: Any) -> Any:
    """A field that the config did not have in an earlier version, whose behaviour is its default.

    It enters the identity only with another value, so the outputs of that version keep their names.
    """
    extra: dict[str, Any] | Callable[..., None] = {"added": True}
    return Field(default, json_schema_extra=extra, **kwargs)


def _is(field: FieldInfo, mark: str) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(mark))


def _members(kind: Any) -> Iterator[Any]:
    """The member types of a union; a literal counts as its value's type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from _members(arguments[0])
    elif origin in (Union, UnionType):
        for each in arguments:
            yield from _members(each)
    elif origin is Literal:
        yield from map(type, arguments)
    else:
        yield kind


@cache
def _numbers(config: type[BaseModel]) -> dict[str, frozenset[type]]:
    """The fields of a config that hold nothing but numbers and truth values, and which of them."""
    kinds = {name: frozenset(_members(field.annotation)) - {NoneType} for name, field in config.model_fields.items()}
    return {name: found for name, found in kinds.items() if found and found <= {int, float, bool}}


def _other_type(value: Any, kinds: frozenset[type]) -> str:
    """What belongs in the place of a value that has another type than a number or truth value; empty if it fits."""
    if not isinstance(value, str | bool | int | float):
        return ""
    fits = not isinstance(value, str) and isinstance(value, bool) == (bool in kinds)
    return "" if fits else "true or false" if bool in kinds else "a number"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys.

    Examples:
        >>> flatten({"train": {"steps": 100, "model": {"kind": "dit"}}})
        {'train.steps': 100, 'train.model.kind': 'dit'}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


class Problem(NamedTuple):
    """The first problem of refused values. Its text is one line: place and message."""

    place: str
    """The dotted key; empty for the values as a whole."""
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, self))


def problem(error: ValidationError, values: Any = None) -> Problem:
    """The first problem that pydantic found.

    Args:
        error: what pydantic raised.
        values: the refused values, to distinguish keys from the names of a union's branches.
    """
    first = error.errors(include_url=False)[0]
    message = _MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
    return Problem(_place(first["loc"], values), message)


def _place(loc: tuple[str | int, ...], values: Any) -> str:
    """The dotted key of an error, without the parts that name a branch of a union."""
    parts: list[str] = []
    for part in loc:
        inside = values if isinstance(values, dict) else {}
        if re.match(r"[A-Z]|\w+\[", str(part)) or (part == inside.get("kind", "local") and part not in inside):
            continue
        parts.append(str(part))
        values = inside.get(part)
    return ".".join(parts)


def _selected(value: Any, left_out: Callable[[FieldInfo, Any], bool]) -> Any:
    """A JSON value without the fields of configs that are left out."""
    if isinstance(value, Config):
        fields = [(name, field, getattr(value, name)) for name, field in type(value).model_fields.items()]
        return {name: _selected(item, left_out) for name, field, item in fields if not left_out(field, item)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [_selected(item, left_out) for item in value]
    if isinstance(value, dict):
        return {key: _selected(item, left_out) for key, item in value.items()}
    return value
