"""The guide of autoguidance: another trained model, which must fit the model that it guides."""

from dataclasses import replace
from typing import Final

import torch

from dit.export import CheckpointManifest, ModelCard, Trained, load, weights_file
from dit.samplers.config import SampleConfig
from dit.samplers.guidance import UNGUIDED
from storage import uri
from storage.channels import PLANNED
from storage.errors import InputError
from storage.manifest import Manifest

NAME: Final = "guide"
"""Of the guide among the inputs of the samples."""
_TRAINING: Final = ("times", "logit_mean", "logit_std", "cosine", "p_mean", "p_std")
"""Fields of a process that its training alone uses."""
_HINT: Final = "name a model of the same process, latents and classes"


def parents(config: SampleConfig) -> dict[str, Manifest]:
    """The manifest of the guide, by its name; none at scale 1, where it guides nothing.

    Raises:
        InputError: there is no trained model.
    """
    if config.guide is None or config.guidance_scale == UNGUIDED:
        return {}
    try:
        return {NAME: CheckpointManifest.read(config.guide)}
    except InputError as error:
        raise InputError(f"sample.guide: {error}") from error


def guide_of(config: SampleConfig, card: ModelCard) -> CheckpointManifest | None:
    """The guide, checked to fit a model; None without one.

    Args:
        config: how to sample. A reference to MLflow must have been replaced by a location.
        card: of the model to guide, which may not be trained yet.

    Raises:
        InputError: there is no such guide, it does not fit the model, or it has no such weights.
    """
    guide = parents(config).get(NAME)
    if guide is None:
        return None
    assert isinstance(guide, CheckpointManifest)
    where = uri.redact(guide.uri)
    theirs, ours = _facts(guide.card), _facts(card)
    if card.channels != PLANNED:
        theirs, ours = theirs | _scales(guide.card), ours | _scales(card)
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            there, here = (facts.get(name, "none") for facts in (theirs, ours))
            raise InputError(f"sample.guide: {where} has {name} {there}, and the model {here}; {_HINT}")
    file = weights_file(config.guide_weights)
    if file not in guide.card.weights:
        raise InputError(f"sample.guide_weights: {where} has no {file}; it has {', '.join(sorted(guide.card.weights))}")
    return guide


def with_guide(config: SampleConfig, trained: Trained, on: torch.device | str) -> Trained:
    """The model with the guide that the config names, loaded.

    Raises:
        InputError: as `guide_of`, or the weights do not load.
        StorageError: a file is missing or holds other bytes than were committed.
    """
    guide = guide_of(config, trained.card)
    if guide is None:
        return trained
    return replace(trained, guide=load(guide.uri, weights=weights_file(config.guide_weights), device=on))


def conditions(config: SampleConfig, card: ModelCard) -> dict[str, str | int | float]:
    """The conditions of samples that a guide has guided: which model it is; none without one. Errors as `guide_of`."""
    guide = guide_of(config, card)
    if guide is None:
        return {}
    return {"guide": guide.digest, "guide_weights": config.guide_weights, "guide_training_steps": guide.card.steps}


def _facts(card: ModelCard) -> dict[str, object]:
    """What must be the same: process, autoencoder, shape of the latents, and the classes' names."""
    model = card.model
    names = card.class_names if model.num_classes else ()
    process = {name: value for name, value in card.diffusion.identity().items() if name not in _TRAINING}
    return {
        **{f"diffusion.{name}": value for name, value in process.items()},
        **{f"vae.{name}": value for name, value in (card.vae.identity() if card.vae else {}).items()},
        **{name: getattr(model, name) for name in ("in_channels", "input_size", "num_classes")},
        **{f"class {label}": name for label, name in enumerate(names)},
    }


def _scales(card: ModelCard) -> dict[str, object]:
    """What each channel of the latents is normalised by; empty where the autoencoder's scale is taken for all."""
    scales = {"mean": card.channels.mean, "deviation": card.channels.deviation} if card.channels else {}
    return {f"{name} of channel {i}": value for name, scale in scales.items() for i, value in enumerate(scale)}
