"""Threads for work that waits for storage, or runs in libraries that release Python's global lock."""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

from storage import patience

T = TypeVar("T")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""Where a container finds its share of all cores' time: microseconds, or `max`, in microseconds."""


def cores() -> int:
    """Processor cores that this process may use: a container or a Slurm job may have a part of the machine's.

    A part is a set of cores, or a share of all cores' time (Linux, cgroup v2), rounded up to whole cores.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, of = CPU_MAX.read_text().split()
        return max(1, min(count, math.ceil(int(share) / int(of))))
    except (OSError, ValueError):  # not in a container, or `max`: no share
        return count


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool; when its block ends, by an error too, tasks that have not begun are cancelled.

    After an error no task waits for a store any longer.

    Args:
        count: threads; 0 means one for each core.
    """
    pool = ThreadPoolExecutor(count or cores())
    try:
        yield pool
    except BaseException:
        with patience.given_up():
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown(cancel_futures=True)


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items in order, prepared by a thread while the caller uses the items before them.

    Args:
        items: iterated in the thread; an error is raised in the place of the item that raised it.
        depth: items that are prepared in advance.
    """
    iterator = iter(items)
    with threads(1) as thread:
        prepared = deque(thread.submit(_next, iterator) for _ in range(depth))
        while item := prepared.popleft().result():
            prepared.append(thread.submit(_next, iterator))
            yield item[0]


def _next(iterator: Iterator[T]) -> tuple[T, ...]:
    """The next item as a tuple of one; empty at the end."""
    return tuple(islice(iterator, 1))
