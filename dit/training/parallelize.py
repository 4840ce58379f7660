"""How ranks share a model: each holds a copy (DDP) or a shard (FSDP). The model does not know."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.ranks import Ranks
from dit.training.per_block import blocks

# Imported only where parameters are sharded: it takes seconds.
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

Parallel = Literal["ddp", "fsdp", "hsdp"]


def shard(model: nn.Module, parallel: Parallel, ranks: Ranks, device: torch.device) -> None:
    """Shard a model's parameters over the ranks. With DDP, or on one rank, there is nothing to do.

    Parameters are replaced in place by their shards, under the same names, so create optimizer and averages
    after this. A block is gathered while it computes, forward and backward (Zhao et al., arXiv 2304.11277).

    Args:
        model: with the same weights on all ranks.
        parallel: ``ddp`` shards nothing; ``fsdp`` shards over all ranks; ``hsdp`` over those of each machine.
        ranks: the ranks that train.
        device: where the model is.
    """
    if ranks.world_size == 1 or parallel == "ddp":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shards = ranks.world_size if parallel == "fsdp" else int(os.environ["LOCAL_WORLD_SIZE"])
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes to it
    grid = init_device_mesh(device.type, (ranks.world_size // shards, shards), mesh_dim_names=("replicas", "shards"))
    mesh = grid if parallel == "hsdp" else grid["shards"]
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh)


def data_parallel(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model with gradients averaged over the ranks: wrapped in DDP, unless FSDP does it already."""
    return model if ranks.world_size == 1 or is_fsdp(model) else DistributedDataParallel(model)


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether backward passes within the block average gradients over ranks, or only accumulate them."""
    if is_fsdp(model):
        model.set_requires_gradient_sync(enabled)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not enabled else nullcontext():
        yield


def saving_ranks(parameters: Iterable[Tensor]) -> list[int]:
    """The ranks that together hold one copy of a model; rank 0 is among them."""
    for parameter in parameters:
        if is_dtensor(parameter):
            mesh = parameter.device_mesh
            return [int(rank) for rank in mesh.mesh.flatten()[: mesh.size(-1)]]
    return [0]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; shares its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. All ranks that hold shards of it must call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Copies of all tensors in the first rank's host memory; empty on other ranks. All ranks must call this."""
    copies = {}
    for name, tensor in sorted(tensors.items()):  # in the same order on all ranks, which a loaded state has not
        full = full_tensor(tensor.detach())
        if ranks.first:
            copies[name] = full.to("cpu", copy=True).contiguous()
    return copies


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is sharded."""
    return hasattr(tensor, "device_mesh")


def is_fsdp(model: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether a model's parameters are sharded."""
    return hasattr(model, "set_requires_gradient_sync")
