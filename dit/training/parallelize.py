"""How ranks share a model: each holds a copy, or a part. The model does not know."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.ranks import Ranks
from dit.training.blocks import blocks

# Imported where parameters are dealt alone: it takes seconds.
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

Parallel = Literal["ddp", "fsdp", "hsdp"]


def shard(model: nn.Module, parallel: Parallel, ranks: Ranks, device: torch.device) -> None:
    """Deal a model's parameters among the ranks, unless they are to hold copies; alone there is nothing to do.

    Parameters are replaced in place by their parts, under their names, so optimizer and averages come after
    this. A block is gathered while it computes, forward and backward (Zhao et al., arXiv 2304.11277).

    Args:
        model: with the same weights on all ranks.
        parallel: ``ddp`` deals nothing; ``fsdp`` among all ranks; ``hsdp`` among those of each machine.
        ranks: those that train.
        device: where the model is.
    """
    if ranks.world_size == 1 or parallel == "ddp":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shards = ranks.world_size if parallel == "fsdp" else int(os.environ["LOCAL_WORLD_SIZE"])
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # that nobody writes to
    grid = init_device_mesh(device.type, (ranks.world_size // shards, shards), mesh_dim_names=("replicas", "shards"))
    mesh = grid if parallel == "hsdp" else grid["shards"]
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh)


def synchronised(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model with gradients averaged over the ranks; one whose parameters are dealt does so by itself."""
    return model if ranks.world_size == 1 or _is_dealt(model) else DistributedDataParallel(model)


@contextmanager
def exchanging(model: nn.Module, now: bool) -> Iterator[None]:
    """Within it backward passes exchange gradients between ranks, or only add them up."""
    if _is_dealt(model):
        model.set_requires_gradient_sync(now)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext():
        yield


@dataclass(frozen=True)
class Part:
    """Which part of the state a rank writes when all is saved."""

    number: int = 0
    """From 0; that one also has what is not dealt."""
    count: int = 1
    written: bool = True
    """Whether it is this rank that writes it, and not another that holds the same."""


def part_of(tensors: Iterable[Tensor], ranks: Ranks) -> Part:
    """The part that this rank holds of a state; of one that is not dealt the first rank writes all."""
    for tensor in tensors:
        if _is_part(tensor):
            *replica, number = tensor.device_mesh.get_coordinate() or [0]
            return Part(number, tensor.device_mesh.size(-1), not any(replica))
    return Part(written=ranks.first)


def held(tensors: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
    """Copies in the host's memory of what a rank writes."""
    if not part.written:
        return {}
    mine = {name: each for name, each in tensors.items() if part.number == 0 or _is_part(each)}
    return {name: local(each.detach()).to("cpu", copy=True).contiguous() for name, each in mine.items()}


def put_together(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole tensors of a state that was saved in parts, which are stretches of the first axis, in order."""
    cut = parts[-1].keys() if len(parts) > 1 else ()
    return {name: torch.cat([part[name] for part in parts]) if name in cut else each for name, each in parts[0].items()}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if _is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Ranks that hold parts of it must all ask."""
    return tensor.full_tensor() if _is_part(tensor) else tensor


def dealt(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, in the parts that ``like`` is in."""
    if not _is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Copies of all tensors in the first rank's host memory; none on the others, which must ask too."""
    found = {}
    for name, tensor in sorted(tensors.items()):  # the same order on all: what was loaded has another on each
        full = whole(tensor.detach())
        if ranks.first:
            found[name] = full.to("cpu", copy=True).contiguous()
    return found


def _is_part(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "device_mesh")


def _is_dealt(model: nn.Module) -> "TypeGuard[FSDPModule]":
    return hasattr(model, "set_requires_gradient_sync")
