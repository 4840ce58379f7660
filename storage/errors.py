"""Errors for people: one line that says what is wrong, where, and what to do."""

import re


class DitflowError(Exception):
    """A failure that is explained in one line. The command exits with 1."""


class InputError(DitflowError):
    """The user's input is wrong: a config, a path, an image, a weights file. The command exits with 2."""


class StorageError(DitflowError):
    """Stored bytes cannot be read or written, or differ from those that were committed. The command exits with 1."""


class PreemptedError(DitflowError):
    """The stage was told to stop and has saved its work; the same command resumes it. Exits with 75 (EX_TEMPFAIL)."""

    EXIT_CODE = 75


class SubmittedError(DitflowError):
    """The work goes on elsewhere; the same command looks how far it is. Exits with 3."""

    EXIT_CODE = 3


def one_line(error: Exception) -> str:
    """Type and first line of a library's error, without passwords."""
    lines = str(error).strip().splitlines()
    return re.sub(r"://[^/\s]*@", "://", f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
