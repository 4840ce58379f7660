"""What this process asks Prefect's server: lists page by page, and errors in one line."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from storage import uri
from storage.errors import DitflowError, one_line

PAGE = 200
"""The server gives no more of anything at once."""
T = TypeVar("T")


def all_pages(read: Callable[..., list[T]]) -> list[T]:
    """All that a method of Prefect's client lists, page after page.

    Args:
        read: the method, which takes ``limit`` and ``offset``. Its order must be one that no two things share: else
            pages might leave one out.
    """
    found: list[T] = []
    while page := read(limit=PAGE, offset=len(found)):
        found += page
    return found


@contextmanager
def prefect_errors() -> Iterator[None]:
    """For the length of the block, say in one line that Prefect's server refuses, or does not answer any more.

    Raises:
        DitflowError: it does so.
    """
    from httpx import RequestError
    from prefect.exceptions import PrefectHTTPStatusError  # late: Prefect reads its settings then

    try:
        yield
    except (RequestError, PrefectHTTPStatusError) as error:
        where, said = uri.redact(os.environ.get("PREFECT_API_URL", "Prefect")), one_line(error)
        if isinstance(error, RequestError):
            what = f"Prefect does not answer any more ({said}); start it, and run the same command again to continue"
        else:
            what = f"Prefect refuses ({said}); see its log, PREFECT_API_KEY and PREFECT_API_AUTH_STRING"
        raise DitflowError(f"{where}: {what}") from error
