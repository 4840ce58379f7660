"""Autoencoders of latent diffusion (Rombach et al. 2022) in diffusers' format.

Models are trained on scaled latents, (z - shift_factor) * scaling_factor, which have about unit variance. What latents
are depends on the class of the autoencoder: see `dit.autoencoders`.
"""

# B = batch, H = W = image sides, C = latent channels, h = H / downsample, w = W / downsample

import io
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save as save_tensors
from torch import Tensor

from dit.autoencoders import KL, Autoencoder, parse
from dit.latent_scale import LatentScale
from dit.pixels import Rounding, to_bytes, to_unit
from dit.weights import DIFFUSERS_WEIGHTS, read_weights, unpickled, weights_hash
from storage import uri
from storage.config import Config, Location, operational
from storage.errors import InputError, StorageError, one_line
from storage.latents import VaeInfo
from storage.seal import json_digest

CONFIG: Final = "config.json"
WEIGHTS: Final = DIFFUSERS_WEIGHTS[0]
FOLDERS: Final = ("", "vae/")
"""Places of an autoencoder below its source: the source itself, or within a pipeline."""
HINT: Final = f"needed is {WEIGHTS}, which AutoencoderKL.from_pretrained(...).save_pretrained(folder) writes"


class VaeRef(Config):
    """An autoencoder. Its location is not part of the identity; the hash of its weights is."""

    source: Location = operational()
    """Autoencoder: a folder, an fsspec URL of a folder, or a Hugging Face hub id. It holds an AutoencoderKL,
    AutoencoderKLFlux2, VQModel, AutoencoderDC, AutoencoderTiny or AutoencoderRAE of diffusers, or a pipeline with one.
    Where there are several files of weights, safetensors is read rather than bin, and full precision rather than
    fp16."""
    sha256: str | None = operational(None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 that the file of weights must have, 64 hex digits. Null: any file is accepted."""


@dataclass(frozen=True)
class Vae:
    """An autoencoder, and the scaling of its latents."""

    model: Any
    """A network of diffusers."""
    sha256: str
    """Hash of the weights file."""
    downsample: int
    """Pixels per latent pixel, along each side."""
    channels: int
    scaling_factor: float
    shift_factor: float
    kind: Autoencoder = field(default_factory=KL)
    """What its class does with images and latents."""

    def info(self, source: str) -> VaeInfo:
        """What manifests and cards say of an autoencoder that was read from there."""
        return VaeInfo(
            source=source,
            sha256=self.sha256,
            downsample=self.downsample,
            channels=self.channels,
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of images, unscaled.

        Args:
            images: uint8 (B, H, W, 3), sides divisible by ``downsample``.

        Returns:
            Mean and standard deviation, float32 (B, C, h, w), on the model's device.
        """
        return self.kind.posterior(self.model, to_unit(images.to(self.model.device)))

    @torch.no_grad()
    def decode(self, latents: Tensor, rounding: Rounding = "nearest", scale: LatentScale | None = None) -> Tensor:
        """The images of scaled latents.

        Args:
            latents: (B, C, h, w), scaled.
            rounding: see `to_bytes`.
            scale: their scale; None for ``(z - shift_factor) * scaling_factor``.

        Returns:
            uint8 (B, H, W, 3).
        """
        scale = scale or LatentScale(self.shift_factor, self.scaling_factor)
        z = scale.unscaled(latents.to(self.model.device).float())
        return to_bytes(self.kind.images(self.model, z), rounding)


def load_vae(ref: VaeRef, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Vae:
    """The autoencoder, frozen and ready to run on a device in a precision.

    Raises:
        InputError: config or weights are missing or damaged, or the weights have another hash than ``ref`` says.
    """
    config, name, kind, weights, sha256 = _read(ref)
    with tempfile.TemporaryDirectory() as folder:  # so diffusers loads the bytes that were hashed, and nothing else
        Path(folder, CONFIG).write_bytes(config)
        Path(folder, WEIGHTS).write_bytes(weights)
        model = _load(name, Path(folder), uri.redact(ref.source))
    model.requires_grad_(False).eval()
    kind.prepare(model.to(memory_format=torch.channels_last), device, dtype)
    return Vae(model, **_info(ref.source, sha256, kind).model_dump(exclude={"source"}), kind=kind)


def info(ref: VaeRef) -> VaeInfo:
    """Scaling, sizes and weights hash of the autoencoder. The network is not built.

    Raises:
        InputError: as `load_vae`.
    """
    _, _, kind, weights = _read_config(ref)
    return _info(ref.source, weights_hash(weights, ref.sha256, HINT), kind)


def vae_inputs(ref: VaeRef | None) -> dict[str, str]:
    """The autoencoder as an input of a stage: a digest of all that its latents depend on; empty without one.

    Raises:
        InputError: as `load_vae`.
    """
    return {"vae": json_digest(info(ref).identity())} if ref else {}


def packages(ref: VaeRef) -> list[str]:
    """Packages that this autoencoder needs beside those that all need.

    Raises:
        InputError: as `load_vae`.
    """
    _, _, kind, _ = _read_config(ref)
    return [kind.NEEDS] if kind.NEEDS else []


def fetch(ref: VaeRef, folder: Path) -> dict[str, str]:
    """Copy the autoencoder's config and weights into a local folder, which is created if needed.

    Safetensors are copied byte for byte; weights in a pickle become safetensors.

    Returns:
        The SHA-256 of the two copies, by name.

    Raises:
        InputError: as `load_vae`.
    """
    config, _, _, weights, _ = _read(ref)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    return {CONFIG: uri.sha256(config), WEIGHTS: uri.sha256(weights)}


def _read(ref: VaeRef) -> tuple[bytes, str, Autoencoder, bytes, str]:
    """The config as bytes, its class and fields, the weights as safetensors, and the hash of their file."""
    config, name, kind, url = _read_config(ref)
    weights, sha256 = read_weights(url, ref.sha256, HINT)
    if url.endswith(".bin"):
        where = uri.redact(url)
        try:
            weights = save_tensors(unpickled(io.BytesIO(weights), where))
        except InputError:
            raise
        except Exception as error:  # torch and safetensors promise no exception types
            raise InputError(f"{where}: is damaged ({one_line(error)}); fetch it again") from error
    return config, name, kind, weights, sha256


def _read_config(ref: VaeRef) -> tuple[bytes, str, Autoencoder, str]:
    """The config as bytes, its class and fields, and the URL of the weights."""
    if ref.source.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt")):
        made = "AutoencoderKL.from_single_file(file).save_pretrained(folder)"
        raise InputError(f"{uri.redact(ref.source)}: is a file; name a folder of diffusers, as {made} writes it")
    url, place = _locate(ref.source, [f"{folder}{CONFIG}" for folder in FOLDERS])
    try:
        config = uri.read(url, uri.MAX_TEXT)
    except StorageError as error:
        raise InputError(f"{error}; name a folder with {CONFIG} and {WEIGHTS}, or a hub id") from error
    name, kind = parse(config, uri.redact(url))
    folder = place.removesuffix(CONFIG)
    return config, name, kind, _locate(ref.source, [f"{folder}{weights}" for weights in DIFFUSERS_WEIGHTS])[0]


def _info(source: str, sha256: str, kind: Autoencoder) -> VaeInfo:
    factor, shift = kind.scale
    return VaeInfo(
        source=source,
        sha256=sha256,
        downsample=kind.downsample,
        channels=kind.channels,
        scaling_factor=factor,
        shift_factor=shift,
    )


def _locate(source: str, names: list[str]) -> tuple[str, str]:
    """The URL and name of the first of these files that the source has; if it is on the hub, downloaded first.

    Without any, those of the first one, which reading then reports as missing.
    """
    if Path(source).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        places = [(uri.join(source, name), name) for name in names]
        return next((place for place in places if uri.exists(place[0])), places[0])
    errors: list[Exception] = []
    for name in names:
        try:
            return hf_hub_download(source, name), name
        except EntryNotFoundError as error:
            errors.append(error)
        except (OSError, ValueError) as error:
            errors.append(error)
            break
    raise InputError(
        f"{source}: not a folder here, and {names[0]} cannot be downloaded from the hub ({one_line(errors[0])}); "
        f"name a local folder with {CONFIG} and {WEIGHTS}"
    ) from errors[0]


def _load(kind: str, folder: Path, source: str) -> Any:
    import diffusers  # takes seconds to import

    try:
        model, report = getattr(diffusers, kind).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers promises no exception types for what it cannot read
        raise InputError(f"{source}: {CONFIG} or {WEIGHTS} is damaged ({one_line(error)}); fetch both again") from error
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        differ = f"{len(wrong)} tensors differ, such as {wrong[0]}"
        raise InputError(f"{source}: {WEIGHTS} does not fit {CONFIG} ({differ}); fetch both again")
    return model
