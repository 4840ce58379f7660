"""The processes that do a stage together, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from storage.tracker import NullTracker, Tracker

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and tracks."""
        return self.rank == 0

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all ranks."""
        value = value.detach().double()
        if self.world_size > 1:
            dist.all_reduce(value)
        return value.item() / self.world_size

    def agreed(self, value: T) -> T:
        """The first rank's value, on all of them."""
        held = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(held)
        return held[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks in their order, on the first; none on the others."""
        if self.world_size == 1:
            return [value]
        found: list[Any] | None = [None] * self.world_size if self.first else None
        dist.gather_object(value, found)
        return found or []

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()


@dataclass(frozen=True)
class Share(NullTracker):
    """Hears the progress of the first rank's part, and tells that of the whole as if all ranks were as far."""

    tracker: Tracker
    before: int
    """Units that were done before any rank began."""
    todo: int
    """Units that all ranks do together."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Tell of the whole when ``done`` of the part's ``total`` are."""
        self.tracker.progress(self.before + round(done * self.todo / total), self.before + self.todo, unit)


def cores() -> int:
    """Processor cores for each rank of this machine."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def joined(timeout: timedelta | None = None) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, for the length of the block; alone without torchrun.

    Args:
        timeout: how long one waits for the others before it gives up; torch's default by default.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout)
    ranks = Ranks(dist.get_rank(), world_size)
    try:
        ranks.wait()  # or one that fails at once would be gone before others have found it, and they fail of that
        yield ranks
    finally:
        dist.destroy_process_group()
