"""Hashes of JSON: objects that end in their own hash, so that no byte changes unnoticed, and digests of values."""

import hashlib
import json
from typing import Any

from pydantic_core import from_json

_LAST = b',\n "sha256": "'
_NOT_CONTENT = ("format", "config", "provenance", "code_version", "created", "cost", "account", "statistics")
_FOR_PEOPLE = "artifacts/"  # what `storage.tracker.publish` writes: a curve has a point for each step that was logged
_PLACES = ("uri", "source")  # fields of a parent and of an autoencoder


class BrokenSealError(ValueError):
    """The bytes are not those that were sealed."""


class NeverSealedError(BrokenSealError):
    """The bytes are JSON without a seal, as earlier versions wrote it."""


def sealed(text: bytes) -> bytes:
    """A JSON object with a last field more: ``sha256``, the SHA-256 of all bytes before this field, 64 hex digits.

    Examples:
        >>> opened(sealed(b'{"images": 3}'))
        b'{"images": 3}'
    """
    body = text.removesuffix(b"}").rstrip()
    return b'%s%s%s"\n}' % (body, _LAST, hashlib.sha256(body).hexdigest().encode())


def opened(data: bytes) -> bytes:
    """The JSON object that was sealed.

    Raises:
        BrokenSealError: a byte was changed, lost or added.
        NeverSealedError: an object of an earlier version, which has no seal.
    """
    body, _, _ = data.rpartition(_LAST)
    text = body + b"}"
    if not body or sealed(text) != data:
        raise (NeverSealedError if _is_unsealed(data) else BrokenSealError)("does not end in the hash of its bytes")
    return text


def _is_unsealed(data: bytes) -> bool:
    try:
        values = from_json(data)
    except ValueError:
        return False
    return isinstance(values, dict) and "sha256" not in values


def content(text: bytes) -> str:
    """SHA-256 of a manifest's content, 64 hex digits; see `storage.manifest.Manifest.content`.

    Args:
        text: the manifest as it was written, without its seal: a field that a later version adds changes nothing.
    """
    values = {name: value for name, value in from_json(text).items() if name not in _NOT_CONTENT}
    values["files"] = [entry for entry in values["files"] if not entry["path"].startswith(_FOR_PEOPLE)]
    return json_digest(_without_places(values))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if key not in _PLACES}
    return [_without_places(item) for item in value] if isinstance(value, list) else value


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, 64 hex digits.

    Examples:
        >>> json_digest({"b": 1, "a": 2}) == json_digest({"a": 2, "b": 1})
        True
    """
    return hashlib.sha256(canonical(value)).hexdigest()


def canonical(value: Any) -> bytes:
    """A JSON value as text: sorted keys, no spaces, only ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
