"""Lists of archives that several uses share. Imports no archive, so that any command can begin with it."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

RefT = TypeVar("RefT", bound=Hashable)
ListedT = TypeVar("ListedT")

_LISTED: ContextVar[dict[Hashable, Any] | None] = ContextVar("_LISTED", default=None)


@contextmanager
def listed_once() -> Iterator[None]:
    """Within the block each archive is listed once: a later change of its files is not noticed.

    A block inside another shares its lists and drops them at its end, because those of a million images are large.
    """
    lists = _LISTED.get()
    lists = {} if lists is None else lists
    token = _LISTED.set(lists)
    try:
        yield
    finally:
        lists.clear()
        _LISTED.reset(token)


def listed(ref: RefT, make: Callable[[RefT], ListedT]) -> ListedT:
    """What ``make`` lists, kept until the end of the block if this is inside of one."""
    lists = _LISTED.get()
    if lists is None:
        return make(ref)
    if ref not in lists:
        lists[ref] = make(ref)
    found: ListedT = lists[ref]
    return found
