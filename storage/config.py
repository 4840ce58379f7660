"""The base of every config: frozen, strict, and with an identity that names what a stage makes."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """An immutable model that refuses unknown keys.

    The same class is the check of the YAML and the form in the Prefect UI, so each field carries a
    description with its unit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """The JSON values that decide the bytes a stage makes: all fields but the operational ones."""
        return {
            name: _identity(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational"))
        }


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """A field that says how or from where a stage runs, not what it makes: left out of the digest.

    Locations belong here too, because what lies there enters the digest by its own hash.
    """
    extra: dict[str, Any] | Callable[..., None] = {"operational": True}
    return Field(default, json_schema_extra=extra, **kwargs)


def _identity(value: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [_identity(item) for item in value]
    if isinstance(value, dict):
        return {key: _identity(item) for key, item in value.items()}
    return value
