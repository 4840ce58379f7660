"""The weights that a run starts from, and what of them fits its model.

They are those of a model that was trained here, or of a checkpoint of others that `dit.convert` reads. Nothing of the
optimizer is taken. What does not fit is a class that the source does not have, or a layer of another shape. Tables that
depend on the latent's size fit always: positions are fixed, and the bias of relative positions is interpolated.
"""

# D = width, h = heads, w = side of an attention window, in tokens

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Final

import torch
from torch import Tensor, nn

from dit.convert import Pretrained, read
from dit.convert.diffusers import CONFIG
from dit.convert.files import PICKLES, SAFETENSORS, suffix
from dit.convert.layout import TABLE
from dit.convert.pretrained import HEADS
from dit.convert.source import KINDS, PIPELINE, TRANSFORMER
from dit.diffusion.config import FlowConfig, ProcessConfig
from dit.export import CheckpointManifest, load, weights_file
from dit.models.build import build
from dit.models.config import ModelConfig
from dit.models.tmsa import RelativeBias
from dit.training.config import Init
from dit.weights import DIFFUSERS_WEIGHTS, weights_hash
from storage import uri
from storage.channels import ChannelScale
from storage.errors import InputError
from storage.manifest import Manifest, is_finished, output_folder

NAME: Final = "init"
"""Of the source among the inputs of a run."""
_DATA: Final = ("input_size", "patch_size", "in_channels", "window", "num_classes", "learn_variance")
MAY_DIFFER: Final = (*_DATA, "augmented", "label_dropout", "dropout")
"""Fields of a model in which the source may differ; in all others it must be the same."""


@dataclass(frozen=True)
class Origin:
    """A model that a run can start from."""

    where: str
    """Its location, for people."""
    model: ModelConfig
    diffusion: ProcessConfig
    class_names: tuple[str, ...] | None
    """None if they are not known."""
    channels: ChannelScale | None
    """Statistics that its latents were normalised by; None for an autoencoder's scaling."""
    read: Callable[[], Mapping[str, Tensor]]
    """Reads its weights."""
    notes: tuple[str, ...] = ()
    """What was assumed about a checkpoint of others, a line each."""


@dataclass
class Fit:
    """What a model takes from an origin, by the names of its parameters."""

    same: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)
    """Rows of its label table, and the origin's rows that they are taken from."""
    other: dict[str, str] = field(default_factory=dict)
    """Parameters that do not fit, each with the reason, those that only the origin has included."""


def parents(init: Init | None) -> dict[str, Manifest]:
    """The manifest of what training starts from, by its name, if it was trained here.

    Raises:
        InputError: it is the output of another stage, or damaged.
    """
    trained = _trained_here(init.source) if init else None
    return {NAME: trained} if trained else {}


def inputs(init: Init | None) -> dict[str, str]:
    """The digest of what training starts from, by its name, if it is a checkpoint of others.

    Raises:
        InputError: there is none.
    """
    return {NAME: _weights_sha256(init.source)} if init and not parents(init) else {}


def _trained_here(source: str) -> CheckpointManifest | None:
    return CheckpointManifest.read(source) if is_finished(output_folder(source)) else None


def _weights_sha256(source: str) -> str:
    """The SHA-256 of the file that holds the weights."""
    if suffix(source) in (*PICKLES, SAFETENSORS):
        return weights_hash(source, None)
    names = uri.names(source)
    if PIPELINE in names:
        return _weights_sha256(uri.join(source, TRANSFORMER))
    weights = next((name for name in DIFFUSERS_WEIGHTS if name in names), None)
    if weights is None or CONFIG not in names:
        raise InputError(f"train.init.source: {uri.redact(source)}: no trained model; {KINDS}")
    return weights_hash(uri.join(source, weights), None)


def open_origin(init: Init, model: ModelConfig) -> Origin:
    """The model that a run starts from.

    Args:
        init: says where it is. A reference to MLflow must have been replaced by a location.
        model: config of the model to train, whose number of heads counts where a file does not record it.

    Raises:
        InputError: there is no such model, or it has no such weights.
    """
    where, trained = uri.redact(init.source), _trained_here(init.source)
    if trained is None:
        if init.weights != "ema":
            raise InputError(f"train.init.weights: {where} was not trained here, so there are no others than ema")
        other = _read(init.source, model)
        return Origin(
            where, other.config, other.diffusion, other.class_names, other.channels, lambda: other.state, other.notes
        )
    file, card = weights_file(init.weights), trained.card
    if file not in card.weights:
        raise InputError(f"train.init.weights: {where} has no {file}; it has {', '.join(sorted(card.weights))}")
    return Origin(
        where,
        card.model,
        card.diffusion,
        card.class_names,
        card.channels,
        lambda: load(trained.uri, weights=file).model.state_dict(),
    )


def _read(source: str, model: ModelConfig) -> Pretrained:
    known = getattr(model, "width", None) in HEADS
    of_file = suffix(source) in (*PICKLES, SAFETENSORS)
    try:
        return read(source, heads=getattr(model, "heads", None) if of_file and not known else None)
    except InputError as error:
        hint = (
            "; pass it to ditflow convert, and start from the file that this writes" if "pass --" in str(error) else ""
        )
        raise InputError(f"train.init.source: {error}{hint}") from error


def fit(origin: Origin, model: ModelConfig, class_names: tuple[str, ...]) -> Fit:
    """Compare an origin with the model to train.

    Args:
        origin: what training starts from. Its weights are not read.
        model: config of the model to train.
        class_names: the names of its classes.

    Raises:
        InputError: the origin has another depth, width or the like, or is another kind of model.
    """
    _check_kind(origin, model)
    theirs, ours, tables, found = _parameters(origin.model), _parameters(model), _bias_tables(model), Fit()
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(name), ours.get(name)
        if there is None or here is None:
            found.other[name] = "only here" if there is None else "only there"
        elif name == TABLE:
            found.rows, missing = _rows(origin, model, class_names)
            found.other |= {name: missing} if missing else {}
        elif there == here:
            found.same.append(name)
        elif name in tables:
            found.resized.append(name)
        else:
            found.other[name] = f"{tuple(there)} there, {tuple(here)} here"
    return found


def check_fit(found: Fit, init: Init) -> None:
    """Check that everything fits, or that new weights are to be made.

    Raises:
        InputError: something does not fit; the line names it.
    """
    if found.other and init.mismatch == "refuse":
        hint = "set train.init.mismatch=reinitialise to start these anew"
        raise InputError(f"train.init: {uri.redact(init.source)} does not fit: {described(found)}; {hint}")


def described(found: Fit) -> str:
    """What does not fit, in one line."""
    return ", ".join(f"{name} ({reason})" for name, reason in found.other.items())


@torch.no_grad()
def take(model: nn.Module, origin: Origin, found: Fit) -> None:
    """Give a model the weights that fit. It is not sharded yet.

    Raises:
        InputError, StorageError: the weights cannot be read.
    """
    theirs, ours = origin.read(), dict(model.named_parameters())
    for name in found.same:
        ours[name].copy_(theirs[name])
    for name in found.resized:
        ours[name].copy_(resized(theirs[name], len(ours[name])))
    for row, other in found.rows.items():
        ours[TABLE][row].copy_(theirs[TABLE][other])


def resized(table: Tensor, rows: int) -> Tensor:
    """A table of relative positions ((2w - 1)^2, h) for windows of another side, with so many rows, interpolated.

    Bilinear between the offsets' rows and columns, whose centre, no offset, and ends stay what they are.
    """
    before, after = isqrt(len(table)), isqrt(rows)
    grid = table.T.unflatten(1, (before, before))[None].float()
    other = nn.functional.interpolate(grid, size=(after, after), mode="bilinear", align_corners=True)
    return other[0].flatten(1).T.to(table.dtype)


def learned_the_same(theirs: ProcessConfig, ours: ProcessConfig) -> bool:
    """Whether two processes ask the same of a network, which does not depend on the times that a flow is trained on."""
    if isinstance(theirs, FlowConfig) and isinstance(ours, FlowConfig):
        return (theirs.path, theirs.predict) == (ours.path, ours.predict)
    return theirs == ours


def _check_kind(origin: Origin, model: ModelConfig) -> None:
    theirs, ours = dict[str, Any](origin.model), dict[str, Any](model)
    for name in sorted(theirs.keys() | ours.keys(), key=lambda name: (name != "kind", name)):
        if name not in MAY_DIFFER and theirs.get(name) != ours.get(name):
            there, here = f"{name} {theirs.get(name, 'none')}", ours.get(name, "none")
            raise InputError(f"train.init: {origin.where} has {there}, and the model to train {here}; make them equal")


def _parameters(config: ModelConfig) -> dict[str, torch.Size]:
    """The shapes of the trained parameters by name."""
    with torch.device("meta"):
        model = build(config)
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}


def _bias_tables(config: ModelConfig) -> set[str]:
    with torch.device("meta"):
        modules = build(config).named_modules()
    return {f"{name}.table" for name, module in modules if isinstance(module, RelativeBias)}


def _rows(origin: Origin, model: ModelConfig, class_names: tuple[str, ...]) -> tuple[dict[int, int], str | None]:
    """Our rows of the label table with theirs, by the classes' names; and why others are missing.

    Without names, as many classes are the same classes. The null label's row, the last, is always taken.
    """
    theirs, ours = origin.model.num_classes, model.num_classes
    null = {ours: theirs}
    if origin.class_names is None:
        same = theirs == ours
        return {row: row for row in range(ours if same else 0)} | null, None if same else (
            f"{theirs} classes without names there, {ours} here"
        )
    known = {name: row for row, name in enumerate(origin.class_names)}
    new = [name for name in class_names if name not in known]
    rows = {row: known[name] for row, name in enumerate(class_names) if name in known}
    return rows | null, f"new classes {_few(new)}" if new else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
