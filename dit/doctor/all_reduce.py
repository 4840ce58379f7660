"""The sum over all ranks, by which they share gradients: right, and how fast."""

# n = ranks

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # by a star import

from dit.devices import device
from dit.models.config import dit_config
from dit.models.cost import cost
from dit.ranks import Ranks, joined
from storage.finding import Finding, failed, ok, warning

GPU_BYTES, CPU_BYTES = 2**28, 2**24
ROUNDS = 10
WAIT = timedelta(minutes=2)
SLOW = 10e9
"""Bytes a second between GPUs, below which DDP waits for gradients: PCIe has 10 to 25e9, NVLink over 100e9."""
SKEW_SECONDS = 2.0
GRADIENTS = "XL/2"


@dataclass(frozen=True)
class Sum:
    """What this rank has measured."""

    ranks: int
    nodes: int
    backend: str
    wrong: int
    """Ranks with a wrong sum."""
    bandwidth: float
    """Bus bandwidth, as NCCL's tests define it: bytes times 2 (n - 1) / n, over the seconds of the slowest rank."""
    skew: float
    """Seconds between the first and the last of the ranks' clocks."""


def measure() -> Sum:
    """Join the ranks of torchrun and sum a tensor over them. A single rank joins a group of its own."""
    with joined(WAIT) as ranks:
        if ranks.world_size > 1:
            return _measured(ranks)
        store = HashStore()
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=0, world_size=1)
        try:
            return _measured(ranks)
        finally:
            dist.destroy_process_group()


def judged(found: Sum) -> Finding:
    """What the measurement means."""
    nccl = found.backend == "nccl"
    version = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if nccl else ""
    places = f" on {found.nodes} machines" if found.nodes > 1 else ""
    seen = f"{found.backend}{version}, {found.ranks} rank{'s' if found.ranks > 1 else ''}{places}"
    if found.wrong:
        remedy = "set NCCL_P2P_DISABLE=1, and have the links looked at"
        return failed(f"{seen}: {found.wrong} of them have a wrong sum", remedy)
    if found.ranks > 1:
        size = 4 * cost(dit_config(GRADIENTS)).trained
        seconds = size * 2 * (found.ranks - 1) / found.ranks / found.bandwidth
        speed, large = f"{found.bandwidth / 1e9:.3g} GB/s", f"{size / 1e9:.1f} GB"
        seen += f": {speed}; the gradients of DiT-{GRADIENTS}, {large}, take {seconds:.2g} s"
    if found.skew > SKEW_SECONDS:
        seen += f"; the clocks of the machines differ by {found.skew:.1f} s"
        return warning(seen, "start chrony or ntpd on all of them")
    if nccl and found.ranks > 1 and found.bandwidth < SLOW:
        remedy = "see `nvidia-smi topo -m`; NCCL_DEBUG=INFO names the links, NCCL_SOCKET_IFNAME and _IB_HCA choose"
        return warning(f"{seen}, so they wait for it", remedy)
    return ok(seen)


def _measured(ranks: Ranks) -> Sum:
    where = device()
    count = (GPU_BYTES if where.type == "cuda" else CPU_BYTES) // 4
    values = torch.full((count,), float(ranks.rank + 1), device=where)
    dist.all_reduce(values)
    wrong = int(not bool((values == ranks.world_size * (ranks.world_size + 1) / 2).all()))
    seconds = min(_timed(lambda: dist.all_reduce(values), where) for _ in range(ROUNDS))
    dist.barrier()
    mine = torch.tensor([wrong, seconds, time.time()], dtype=torch.float64, device=where)
    every = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(every, mine)
    errors, times, clocks = torch.stack(every).cpu().unbind(1)
    bandwidth = values.nbytes * 2 * (ranks.world_size - 1) / ranks.world_size / times.max().item()
    nodes = ranks.world_size // int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    return Sum(
        ranks.world_size, nodes, dist.get_backend(), int(errors.sum()), bandwidth, (clocks.max() - clocks.min()).item()
    )


def _timed(work: Callable[[], object], where: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - begin
