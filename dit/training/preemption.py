"""SIGTERM asks training to save and stop. All ranks stop at the same step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from dit.ranks import Ranks, patiently


class Preemption:
    """Whether a rank received SIGTERM. Ranks agree on it in the background, one call late."""

    def __init__(self, ranks: Ranks) -> None:
        self._signalled = False
        several, timeout = ranks.world_size > 1, patiently(dist.default_pg_timeout)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        self._signalled = True

    def requested(self) -> bool:
        """Whether to stop. The same answer on all ranks.

        A single rank answers at once. Of several, it is what any rank knew at the call before this one: so
        the reduction runs beside a step, and no step waits for it.
        """
        if self._group is None:
            return self._signalled
        requested = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            requested = bool(flag)
        flag = torch.tensor(int(self._signalled))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._pending = work, flag
        return requested


@contextmanager
def preemption(ranks: Ranks) -> Iterator[Preemption]:
    """SIGTERM is a request to stop for the length of the block. Outside the main thread it is not handled."""
    state = Preemption(ranks)
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    previous = signal.signal(signal.SIGTERM, state.handle)
    try:
        yield state
    finally:
        signal.signal(signal.SIGTERM, previous)
