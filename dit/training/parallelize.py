"""How ranks share a model: each holds a copy, or a part. The model does not know."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit.ranks import Ranks
from dit.training.layers import blocks

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


def holders(parameters: Iterable[Tensor]) -> list[int]:
    """The ranks that hold all of a model between them, once; the first among them."""
    for parameter in parameters:
        if _is_part(parameter):
            mesh = parameter.device_mesh
            return [int(rank) for rank in mesh.mesh.flatten()[: mesh.size(-1)]]
    return [0]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if _is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Ranks that hold parts of it must all ask."""
    return tensor.full_tensor() if _is_part(tensor) else tensor


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
