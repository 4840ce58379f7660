"""The processes that share a stage's work, as torchrun starts them."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # by a star import

from storage import cost, parallel
from storage.patience import seconds
from storage.tracker import NullTracker, Tracker

T = TypeVar("T")
NCCL_TIMEOUT = timedelta(minutes=10)
"""Torch's default with NCCL."""


@dataclass(frozen=True)
class Ranks:
    """The number of this process, and how many there are."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and tracks."""
        return self.rank == 0

    def agreed(self, value: T) -> T:
        """The first rank's value, on all ranks."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks in order, on the first; empty on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.first else None
        dist.gather_object(value, values)
        return values or []

    def finish(self) -> None:
        """Wait until all ranks have done their part and noted what it cost. Then the first one commits."""
        cost.note()
        self.wait()

    def wait(self) -> None:
        """Wait until all ranks call this."""
        if self.world_size > 1:
            dist.barrier()


@dataclass(frozen=True)
class Share(NullTracker):
    """Turns the progress of the first rank's part into that of the whole, as if all ranks had come as far."""

    tracker: Tracker
    before: int
    """Units done before any rank began."""
    todo: int
    """Units to do, over all ranks."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report the whole's progress when ``done`` of the part's ``total`` are done."""
        self.tracker.progress(self.before + round(done * self.todo / total), self.before + self.todo, unit)


def patiently(timeout: timedelta) -> timedelta:
    """How long ranks wait for one another, of which one may be waiting for a store."""
    return timeout + timedelta(seconds=seconds())


def cores() -> int:
    """Processor cores per rank of this machine, of those that the process may use."""
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    return max(1, parallel.cores() // local)


@contextmanager
def joined(timeout: timedelta | None = None) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, for the length of the block; a single rank without torchrun.

    Args:
        timeout: how long ranks wait for one another; torch's default by default. To it is added how long one of them
            may wait for a store.
    """
    # Another launcher's WORLD_SIZE, such as a cluster's, is not about us.
    world_size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if world_size == 1:
        yield Ranks()
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank = int(os.environ["RANK"])
    timeout = patiently(timeout or (NCCL_TIMEOUT if gpu else dist.default_pg_timeout))
    store = _loopback_store(rank, world_size, timeout)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout, store=store, rank=rank, world_size=world_size)
    ranks = Ranks(rank, world_size)
    try:
        ranks.wait()  # else a rank that fails at once is gone before the others connect, and they fail too
        yield ranks
    finally:
        dist.destroy_process_group()


def _loopback_store(rank: int, world_size: int, timeout: timedelta) -> TCPStore | None:
    """Where the ranks of one machine find each other; None leaves that to torch.

    Torch's own store listens on all interfaces, this one on the loopback address that the launcher gives.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if host != "127.0.0.1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    listener = socket.create_server((host, port)).detach() if rank == 0 else None
    return TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout, master_listen_fd=listener)
