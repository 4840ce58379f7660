"""Batches made in the background while the device computes."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from dit.training.data import Batch
from storage.parallel import threads

DEPTH = 2


class Prefetcher:
    """Makes the batches of consecutive steps in a thread, `DEPTH` of them before they are asked for.

    A batch is a function of its step alone, so it does not matter when it is made.

    Args:
        pool: of one thread.
        make: makes the batch of a step.
        steps: the steps that will be asked for, in order.
    """

    def __init__(self, pool: ThreadPoolExecutor, make: Callable[[int], Batch], steps: range) -> None:
        self.waited = 0.0
        """Seconds that steps have waited for their batches."""
        self._pool, self._make, self._steps = pool, make, iter(steps)
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._pending: deque[Future[Batch]] = deque()
        for _ in range(DEPTH):
            self._submit_next()

    def __call__(self, step: int) -> Batch:
        """The batch of the next step.

        Raises:
            Exception: what making it raised.
        """
        began = time.perf_counter()
        batch = self._pending.popleft().result()
        self.waited += time.perf_counter() - began
        self._submit_next()
        for value in vars(batch).values():
            if self._stream is not None and value is not None:
                value.record_stream(torch.cuda.current_stream())  # its memory belongs to the other stream
        return batch

    def _submit_next(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._pending.append(self._pool.submit(self._on_own_stream, step))

    def _on_own_stream(self, step: int) -> Batch:
        """Make a batch on a CUDA stream of its own, so that its copies do not queue behind earlier steps."""
        if self._stream is None:
            return self._make(step)
        with torch.cuda.stream(self._stream):
            batch = self._make(step)
        self._stream.synchronize()
        return batch


@contextmanager
def prefetched(make: Callable[[int], Batch], steps: range) -> Iterator[Prefetcher]:
    """A prefetcher for the length of the block. Leaving the block waits for the batch that is being made."""
    with threads(1) as pool:
        yield Prefetcher(pool, make, steps)
