"""Keeps opened archives, so that each is listed once within a block. Imports no archive, so any command can use it."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

RefT = TypeVar("RefT", bound=Hashable)
ListedT = TypeVar("ListedT")

_LISTED: ContextVar[dict[Hashable, Any] | None] = ContextVar("_LISTED", default=None)


@contextmanager
def listed_once() -> Iterator[None]:
    """Within the block each archive is listed once; changes of its files after that are not noticed.

    A block inside another shares its lists, and drops them when it ends: a list of a million images is large.
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
    """The result of ``make(ref)``, kept until the block of `listed_once` ends, if there is one."""
    lists = _LISTED.get()
    if lists is None:
        return make(ref)
    if ref not in lists:
        lists[ref] = make(ref)
    result: ListedT = lists[ref]
    return result
