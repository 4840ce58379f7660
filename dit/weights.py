"""Weights files that others made: read whole, hashed, and compared with the hash that is expected."""

from storage import uri
from storage.errors import InputError, StorageError


def read_weights(url: str, expected: str | None) -> tuple[bytes, str]:
    """The bytes of a weights file and their sha256.

    Args:
        url: the file, by path or fsspec URL.
        expected: the sha256 that the file must have, or None to take it as it is.

    Raises:
        InputError: there is no such file, or its hash is another.
    """
    try:
        data = uri.read(url)
    except StorageError as error:
        raise InputError(f"{error}; name the place of the weights file") from error
    found = uri.sha256(data)
    if expected is not None and found != expected.lower():
        raise InputError(
            f"{uri.redact(url)}: its sha256 is {found}, not the expected {expected}; fetch it again or correct sha256"
        )
    return data, found


def one_line(error: Exception) -> str:
    """What a library complains about, cut to its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
