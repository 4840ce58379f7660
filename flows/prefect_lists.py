"""Lists of Prefect's server, which gives at most 200 of anything at once."""

from collections.abc import Callable
from typing import TypeVar

PAGE = 200
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
