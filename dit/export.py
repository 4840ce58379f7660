"""A trained model as files that need nothing else: its weights, its card, and the manifest with their hashes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, ValidationError, field_serializer
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from dit.diffusion.config import ProcessConfig
from dit.models.build import AnyModelConfig, build
from dit.models.config import ModelConfig
from dit.models.lora import Lora
from dit.vae import VaeRef
from storage import uri
from storage.channels import ChannelScale
from storage.config import Config, problem
from storage.errors import InputError, one_line
from storage.header import FileEntry
from storage.latents import LatentManifest, VaeInfo
from storage.manifest import MANIFEST, Manifest, StageOutput, is_finished

MODEL = "model.json"
EMA_WEIGHTS = "model.safetensors"
RAW_WEIGHTS = "model-raw.safetensors"
SAMPLING = "sample.json"
"""In a registered model: its sampling config, and the hashes of the autoencoder's files. It ends in its own hash."""


WeightsName = Annotated[str, Field(pattern=r"^(raw|ema(-[0-9.e-]+)?|power-[0-9.e-]+)$")]
"""Name of a model's weights: ``ema``, ``raw``, or that of a further average, such as ``ema-0.999``, ``power-0.05``."""


def power_average(width: float) -> str:
    """Name of the power-function average of a relative width."""
    return f"power-{width}"


def _reference(text: str) -> str:
    """A location without secrets; or ``models:/name@alias``, which is none."""
    return text if text.startswith("models:/") else uri.checked(text)


ModelReference = Annotated[str, AfterValidator(_reference)]
"""A trained model: the location of its manifest or folder, its MLflow run id, or its name in the registry."""


def weights_file(name: str) -> str:
    """File of the weights with a `WeightsName`."""
    return EMA_WEIGHTS if name == "ema" else f"model-{name}.safetensors"


class ModelCard(Config):
    """Everything needed to rebuild a trained model and to sample from it."""

    model: AnyModelConfig
    """Config of the network."""
    diffusion: ProcessConfig
    """Diffusion process that the model reverses."""
    vae: VaeInfo | None
    """Autoencoder of the latents, and their scaling; None for a model on pixels."""
    channels: ChannelScale | None = Field(default=None, exclude_if=lambda channels: channels is None)
    """Statistics of the latents that training normalised each channel by. None: by the autoencoder's scaling."""
    resolution: int
    """Side of the images, in pixels."""
    class_names: tuple[str, ...]
    """Names of the classes; a label is an index into them."""
    steps: int = Field(ge=0)
    """Training steps taken."""
    lora: Lora | None = Field(default=None, exclude_if=lambda lora: lora is None)
    """Adapters that were trained, and are part of the weights; None if the weights themselves were."""
    ema_std: float | None = Field(default=None, exclude_if=lambda std: std is None)
    """Relative width of an average that was made after training."""
    weights: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each weights file, by name."""

    @field_serializer("model", "diffusion")
    def _written(self, config: Config) -> dict[str, Any]:
        """Without fields of later versions at their defaults, so that a repaired model has the bytes it had."""
        return config.identity()

    @property
    def vae_ref(self) -> VaeRef | None:
        """The autoencoder that made the latents; None for a model on pixels."""
        return VaeRef(source=self.vae.source, sha256=self.vae.sha256) if self.vae else None


class CheckpointManifest(Manifest):
    """A trained model: averaged and raw weights, and its card; or an average made of several."""

    STAGE = "train"
    ALSO = ("average",)

    card: ModelCard
    """The model's config, process, scaling and classes."""

    def latents(self) -> LatentManifest:
        """What the model was trained on.

        Raises:
            InputError: it is gone or was made again otherwise.
        """
        training = self if self.stage == CheckpointManifest.STAGE else self.parent("checkpoint", CheckpointManifest)
        return training.parent("latents", LatentManifest)


@dataclass(frozen=True)
class Trained:
    """A trained model, in evaluation mode, and its card."""

    model: nn.Module
    """Takes noisy latents (B, C, h, h), times (B,) and labels (B,)."""
    card: ModelCard
    notes: tuple[str, ...] = ()
    """For a checkpoint of others: what it is and what was assumed, a line each."""
    guide: "Trained | None" = None
    """The worse model that guides it; None without one."""


def export(
    out: StageOutput, card: ModelCard, weights: Mapping[str, dict[str, torch.Tensor]]
) -> tuple[ModelCard, list[FileEntry]]:
    """Write sets of weights and the card into a stage's folder.

    Args:
        out: the stage's folder.
        card: without hashes.
        weights: by file name, then by parameter name, in the host's memory.

    Returns:
        The card with the hashes of the weights, and what was written.

    Raises:
        StorageError: the disk is full or the store refuses.
    """
    written = [out.put(name, save_tensors(tensors)) for name, tensors in weights.items()]
    card = card.model_copy(update={"weights": {entry.path: entry.sha256 for entry in written}})
    return card, [*written, out.put(MODEL, card.model_dump_json(indent=1).encode())]


def load(url: str, *, weights: str = EMA_WEIGHTS, device: torch.device | str = "cpu") -> Trained:
    """Rebuild a trained model from its files, each compared with its hash in the manifest.

    Args:
        url: the output of a training stage, or a copy of it with its manifest, by path or fsspec URL.
        weights: ``model.safetensors`` for the EMA, ``model-raw.safetensors`` for the last step, or the file of a
            further average.
        device: device to run it on.

    Raises:
        InputError: there is no trained model, or the weights do not fit the card.
        StorageError: a file is missing or holds other bytes than were committed.
    """
    if not is_finished(url):
        raise InputError(f"{uri.redact(url)}: a trained model is a folder with {MANIFEST}, {MODEL} and weights")
    manifest = CheckpointManifest.read(url)
    card, data = _read_card(manifest), manifest.read_object(weights)
    try:
        model = rebuilt(card.model, load_tensors(data))
    except Exception as error:  # safetensors and torch promise no exception types for broken files
        raise InputError(f"{uri.redact(uri.join(url, weights))}: does not load ({one_line(error)})") from error
    return Trained(model.to(device), card)


def rebuilt(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A model in evaluation mode with these weights, by parameter name. They are not copied."""
    with torch.device("meta"):  # skips the initial weights
        model = build(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _read_card(manifest: CheckpointManifest) -> ModelCard:
    try:
        return ModelCard.model_validate_json(manifest.read_object(MODEL, uri.MAX_TEXT))
    except ValidationError as error:
        raise InputError(f"{uri.redact(manifest.uri)}/{MODEL}: not a trained model: {problem(error)}") from error
