"""SIGTERM as a request to save and go, which all ranks follow at the same step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from dit.ranks import Ranks


class Notice:
    """Whether the machine is wanted back. Ranks agree on it in the background, one call behind."""

    def __init__(self, ranks: Ranks) -> None:
        self._given = False
        self._group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def give(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        self._given = True

    def given(self) -> bool:
        """Whether a rank had notice at its call before this one; alone, by now. The same on all ranks."""
        if self._group is None:
            return self._given
        answer = False
        if self._asked is not None:
            work, flag = self._asked
            work.wait()
            answer = bool(flag)
        flag = torch.tensor(int(self._given))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._asked = work, flag
        return answer


@contextmanager
def notice(ranks: Ranks) -> Iterator[Notice]:
    """SIGTERM gives notice for the length of the block; in a thread other than the main one nothing does."""
    found = Notice(ranks)
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = signal.signal(signal.SIGTERM, found.give)
    try:
        yield found
    finally:
        signal.signal(signal.SIGTERM, before)
