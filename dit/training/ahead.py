"""The next batches, made while the device computes."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from dit.training.data import Batch
from storage.parallel import threads

DEPTH = 2


class Ahead:
    """Makes the batches of consecutive steps in a thread, `DEPTH` of them before they are asked for.

    A batch is a function of its step alone, so when it is made does not matter.

    Args:
        pool: of one thread.
        batches: makes a batch.
        steps: those that will be asked for, in order.
    """

    def __init__(self, pool: ThreadPoolExecutor, batches: Callable[[int], Batch], steps: range) -> None:
        self.waited = 0.0
        """Seconds that steps have waited for their batches."""
        self._pool, self._batches, self._steps = pool, batches, iter(steps)
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._begun: deque[Future[Batch]] = deque()
        for _ in range(DEPTH):
            self._begin()

    def __call__(self, step: int) -> Batch:
        """The batch of the next step.

        Raises:
            Exception: what making it raised.
        """
        began = time.perf_counter()
        batch = self._begun.popleft().result()
        self.waited += time.perf_counter() - began
        self._begin()
        for value in vars(batch).values():
            if self._stream is not None and value is not None:
                value.record_stream(torch.cuda.current_stream())  # its memory is the other stream's
        return batch

    def _begin(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._begun.append(self._pool.submit(self._make, step))

    def _make(self, step: int) -> Batch:
        """On a stream of its own, whose copies do not queue up behind the steps before."""
        if self._stream is None:
            return self._batches(step)
        with torch.cuda.stream(self._stream):
            batch = self._batches(step)
        self._stream.synchronize()
        return batch


@contextmanager
def ahead(batches: Callable[[int], Batch], steps: range) -> Iterator[Ahead]:
    """For the length of the block, which ends when the batch that is being made is."""
    with threads(1) as pool:
        yield Ahead(pool, batches, steps)
