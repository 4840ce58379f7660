"""Threads for work that waits on storage or on libraries that release the interpreter's lock."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what has not begun when its block is left, by an error too.

    Args:
        count: threads; 0 means one for each core.
    """
    pool = ThreadPoolExecutor(count or os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items in their order, made by a thread of their own while the caller works on those before.

    Args:
        items: made one after another; what one raises is raised in its place.
        depth: how many are made before they are asked for.
    """
    iterator = iter(items)
    with threads(1) as thread:
        made = deque(thread.submit(_next, iterator) for _ in range(depth))
        while found := made.popleft().result():
            made.append(thread.submit(_next, iterator))
            yield found[0]


def _next(iterator: Iterator[T]) -> tuple[T, ...]:
    """The next item, or nothing at the end."""
    return tuple(islice(iterator, 1))
