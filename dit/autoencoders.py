"""The classes of autoencoder in diffusers' format: what their latents are, by the fields of config.json.

| class | latent |
|---|---|
| AutoencoderKL | a Gaussian posterior: a mean and a standard deviation for each number (Kingma and Welling 2014) |
| AutoencoderKLFlux2 | the same; patches become channels, which the statistics of its batch norm normalise |
| VQModel | the encoder's output before quantisation; the decoder quantises (van den Oord et al. 2017) |
| AutoencoderDC | the encoder's output (DC-AE, arXiv 2410.10733) |
| AutoencoderTiny | the encoder's output, which imitates the scaled latents of another autoencoder (TAESD) |
| AutoencoderRAE | the tokens of a frozen vision transformer, normalised by their statistics (RAE, arXiv 2510.11690) |

Where there is no posterior, the standard deviation is 0.
"""

# B = batch, H = W = image sides, C = latent channels, h = H / downsample, w = W / downsample

from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from storage.config import problem
from storage.errors import InputError

Count = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Widths = Annotated[tuple[int, ...], Field(min_length=1)]
"""Channels of each block of a network. Each block but the first halves the sides."""


class Autoencoder(BaseModel):
    """The fields of config.json that count, with diffusers' defaults, and how the network is used.

    Latents that a pipeline would scale by channel are refused, and so are quantised weights.
    """

    NEEDS: ClassVar[str | None] = None
    """A package that the network needs and that diffusers does not bring."""
    EXTRA: ClassVar[str | None] = None
    """The extra of ours that brings it."""

    block_out_channels: Widths = (64,)
    latent_channels: Count = 4
    scaling_factor: Factor = 1.0
    shift_factor: float | None = Field(default=None, allow_inf_nan=False)
    latents_mean: None = None
    latents_std: None = None
    quantization_config: None = None

    @property
    def downsample(self) -> int:
        """Pixels per latent pixel, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """C."""
        return self.latent_channels

    @property
    def scale(self) -> tuple[float, float]:
        """Factor and shift of the latents: a model sees (z - shift) * factor."""
        return self.scaling_factor, self.shift_factor or 0.0

    @property
    def side(self) -> int | None:
        """The only side of images, in pixels, that it takes; None if every multiple of ``downsample`` will do."""
        return None

    def posterior(self, network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 (B, C, h, w), of images (B, 3, H, W) in -1 .. 1."""
        mean = network.encode(images.to(network.dtype))[0].float()
        return mean, torch.zeros_like(mean)

    def images(self, network: Any, z: Tensor) -> Tensor:
        """The images (B, 3, H, W) in -1 .. 1 of unscaled latents, float32 (B, C, h, w)."""
        images: Tensor = network.decode(z.to(network.dtype)).sample
        return images

    def prepare(self, network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
        """Bring the network to a device and into a precision."""
        nn.Module.to(network, device, dtype)  # the cast of diffusers would warn


class KL(Autoencoder):
    """Stable Diffusion 1 to 3, SDXL, Flux, VA-VAE."""

    scaling_factor: Factor = 0.18215

    def posterior(self, network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Autoencoder`."""
        found = network.encode(images.to(network.dtype)).latent_dist
        return found.mean.float(), (found.logvar.float() / 2).exp()


class Flux2(KL):
    """Flux 2. Its latents are what its transformer sees: p x p patches as channels, normalised by the batch norm.

    The posterior stays Gaussian, since both are linear. The statistics stay in float32 in any precision.
    """

    block_out_channels: Widths = (128, 256, 512, 512)
    latent_channels: Count = 32
    scaling_factor: Factor = 1.0
    patch_size: tuple[Count, Count] = (2, 2)
    batch_norm_eps: float = Field(default=1e-4, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _square_patches(self) -> Self:
        if self.patch_size[0] != self.patch_size[1]:
            raise ValueError(f"patch_size: {list(self.patch_size)} is not square")
        return self

    @property
    def downsample(self) -> int:
        """See `Autoencoder`."""
        return super().downsample * self.patch_size[0]

    @property
    def channels(self) -> int:
        """See `Autoencoder`."""
        return super().channels * self.patch_size[0] ** 2

    def posterior(self, network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Autoencoder`."""
        mean, std = (pixel_unshuffle(part, self.patch_size[0]) for part in super().posterior(network, images))
        center, deviation = self._statistics(network)
        return (mean - center) / deviation, std / deviation

    def images(self, network: Any, z: Tensor) -> Tensor:
        """See `Autoencoder`."""
        center, deviation = self._statistics(network)
        return super().images(network, pixel_shuffle(z * deviation + center, self.patch_size[0]))

    def prepare(self, network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
        """See `Autoencoder`."""
        norm = network.get_submodule("bn")
        del network.bn
        super().prepare(network, device, dtype)
        network.bn = norm.to(device)

    def _statistics(self, network: Any) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C, 1, 1)."""
        mean, variance = network.bn.running_mean, network.bn.running_var
        return mean[:, None, None], (variance + self.batch_norm_eps).sqrt()[:, None, None]


class VQ(Autoencoder):
    """Autoencoders with a codebook."""

    latent_channels: Count = 3
    vq_embed_dim: Count | None = None
    scaling_factor: Factor = 0.18215

    @property
    def channels(self) -> int:
        """See `Autoencoder`."""
        return self.vq_embed_dim or self.latent_channels


class DC(Autoencoder):
    """Deep compression autoencoders, f32 and more."""

    block_out_channels: Widths = Field(default=(128, 256, 512, 512, 1024, 1024), alias="encoder_block_out_channels")
    latent_channels: Count = 32


class Tiny(Autoencoder):
    """TAESD and its like. The network itself turns -1 .. 1 into 0 .. 1 and back, and bounds what it decodes."""

    block_out_channels: Widths = Field(default=(64, 64, 64, 64), alias="encoder_block_out_channels")
    decoder_block_out_channels: Widths = (64, 64, 64, 64)
    upsampling_scaling_factor: Literal[2] = 2

    @model_validator(mode="after")
    def _there_and_back(self) -> Self:
        if len(self.block_out_channels) != len(self.decoder_block_out_channels):
            raise ValueError("decoder_block_out_channels: must be as many as the encoder's")
        return self


class RAE(Autoencoder):
    """Representation autoencoders. The network takes and makes images in 0 .. 1, of one size.

    It also multiplies latents by its factor and divides them again. Here that is undone, so that latents are unscaled
    and the factor is known, as with all others.
    """

    NEEDS: ClassVar[str | None] = "transformers"
    EXTRA: ClassVar[str | None] = "rae"

    encoder_hidden_size: Count = 768
    encoder_patch_size: Count = 14
    encoder_input_size: Count = 224
    patch_size: Count = 16
    reshape_to_2d: Literal[True] = True
    latents_mean: Any = None
    latents_std: Any = None

    @property
    def downsample(self) -> int:
        """See `Autoencoder`."""
        return self.patch_size

    @property
    def channels(self) -> int:
        """See `Autoencoder`."""
        return self.encoder_hidden_size

    @property
    def side(self) -> int | None:
        """See `Autoencoder`."""
        return self.patch_size * (self.encoder_input_size // self.encoder_patch_size)

    def posterior(self, network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Autoencoder`."""
        scaled, std = super().posterior(network, (images + 1) / 2)
        return scaled / self.scaling_factor, std

    def images(self, network: Any, z: Tensor) -> Tensor:
        """See `Autoencoder`."""
        return 2 * super().images(network, (z * self.scaling_factor).contiguous()) - 1


AUTOENCODERS: Final[dict[str, type[Autoencoder]]] = {
    "AutoencoderKL": KL,
    "AutoencoderKLFlux2": Flux2,
    "VQModel": VQ,
    "AutoencoderDC": DC,
    "AutoencoderTiny": Tiny,
    "AutoencoderRAE": RAE,
}
"""By the ``_class_name`` of config.json."""


class _Named(BaseModel):
    class_name: str = Field(alias="_class_name")


def parse(config: bytes, where: str) -> tuple[str, Autoencoder]:
    """The class of an autoencoder, and the fields of its config.json.

    Raises:
        InputError: it is the config of something else or cannot be used, or a package is missing.
    """
    try:
        name = _Named.model_validate_json(config).class_name
        if name not in AUTOENCODERS:
            raise InputError(f"{where}: _class_name {name} is none of {', '.join(AUTOENCODERS)}")
        found = AUTOENCODERS[name].model_validate_json(config)
    except ValidationError as error:
        raise InputError(f"{where}: not the config of an autoencoder: {problem(error)}") from error
    if found.NEEDS and find_spec(found.NEEDS) is None:
        raise InputError(f"{where}: {name} needs {found.NEEDS}; pip install 'ditflow[{found.EXTRA}]'")
    return name, found
