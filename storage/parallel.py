"""Threads for work that waits on storage or on libraries that release the interpreter's lock."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


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
