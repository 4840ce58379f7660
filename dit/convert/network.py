"""Finds the tensors of a DiT among those of a checkpoint, and says which other network they are if none is there."""

import re
from typing import Final

from torch import Tensor

from dit.convert.pretrained import LAYOUT
from storage.errors import InputError

WRAPPERS: Final = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts that DataParallel, torch.compile, FSDP and activation checkpointing put into names."""
ANCHOR: Final = ["x_embedder", "proj", "weight"]
"""Parts of the name of the tensor that shows where a DiT is."""
AVERAGE: Final = re.compile(r"(^|[._])ema")
OTHERS: Final = {
    r"^transformer_blocks\.|^pos_embed\.proj\.": "is diffusers'; name the folder of this file, with its config.json",
    r"^(encoder|decoder)\.": "is an autoencoder's; pass that as --vae, and a DiT as the checkpoint",
    r"(^|\.)(input_blocks|down_blocks)\.": f"is a U-Net's; {LAYOUT}",
}
"""Other networks, by the name of one of their tensors."""


def network(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of the DiT by their published names, and the name under which they were; empty if there was none.

    Averaged weights are preferred to others.

    Raises:
        InputError: there is no DiT, more than one, or one of another kind.
    """
    roots = {root for name in tensors if (root := _root(name)) is not None}
    chosen = sorted(root for root in roots if AVERAGE.search(root)) or sorted(roots)
    if len(chosen) > 1:
        raise InputError(f"{where}: has weights under {' and '.join(chosen)}; save one of them alone")
    if not chosen:
        raise InputError(f"{where}: {_without_a_dit(tensors)}")
    start = f"{chosen[0]}." if chosen[0] else ""
    found = {_plain(name.removeprefix(start)): tensor for name, tensor in tensors.items() if name.startswith(start)}
    if len(found) < sum(name.startswith(start) for name in tensors):
        raise InputError(f"{where}: has a tensor twice, with and without a prefix; save the model's state_dict again")
    if other := _other(found):
        raise InputError(f"{where}: {other}")
    return found, chosen[0]


def unread_average(names: list[str], place: str) -> str | None:
    """Where averaged weights seem to be that were not read, by the names of all entries; None if nowhere."""
    if AVERAGE.search(place):
        return None
    folders = (name.rpartition(".")[0] for name in names)
    return next((folder for folder in folders if AVERAGE.search(folder)), None)


def _root(name: str) -> str | None:
    """The name before that of the DiT's anchor; None for another tensor."""
    parts = name.split(".")
    if [part for part in parts if part not in WRAPPERS][-len(ANCHOR) :] != ANCHOR:
        return None
    return ".".join(parts[: parts.index(ANCHOR[0])])


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _without_a_dit(tensors: dict[str, Tensor]) -> str:
    if not tensors:
        return (
            "contains no tensors by name, nor any under 'ema', 'model' or 'state_dict'; name the file with the weights"
        )
    return _other(tensors) or f"no tensor {'.'.join(ANCHOR)}, but such as {min(tensors)}; {LAYOUT}"


def _other(tensors: dict[str, Tensor]) -> str | None:
    for pattern, reason in OTHERS.items():
        for name in tensors:
            if re.search(pattern, name):
                return f"tensor {name} {reason}"
    return None
