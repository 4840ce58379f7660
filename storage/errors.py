"""The errors a person is meant to read: what is wrong, where, and what to do."""

import re


class DitflowError(Exception):
    """A fault with a one-line explanation. The command exits with 1."""


class InputError(DitflowError):
    """What the user gave is wrong: a config, a path, an image, a weights file. Exits with 2."""


class StorageError(DitflowError):
    """Bytes at rest could not be written, or are not the bytes that were committed. Exits with 1."""


class PreemptedError(DitflowError):
    """The machine is wanted back: the work is saved, and the same command goes on. Exits with 75 (EX_TEMPFAIL)."""

    EXIT_CODE = 75


def one_line(error: Exception) -> str:
    """The kind of a library's error and the first line of what it says, without passwords."""
    lines = str(error).strip().splitlines()
    return re.sub(r"://[^/\s]*@", "://", f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
