"""The processes that train together, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

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

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the ranks that torchrun started, for the length of the block; alone without torchrun."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield Ranks(dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()
