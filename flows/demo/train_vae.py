"""Train the demo's autoencoder: ``python -m flows.demo.train_vae`` (a few minutes on two cores).

A small KL autoencoder (Kingma and Welling 2014; Rombach et al. 2022) of diffusers' own class, so
the demo's latents are made by the same code as those of a larger one. Options train one on other small images.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Final

import numpy as np
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from dit.vae import CONFIG, WEIGHTS, Vae, VaeRef, load_vae
from flows.demo import METRICS, VAE
from flows.demo.digits import SIZE, digit_images
from storage import uri
from storage.archives.open import open_archive
from storage.images.transforms import load

# B = batch, H = W = 32 pixels, C = latent channels, h = w = 8 latent sides

SEED: Final = 0
STEPS: Final = 600
BATCH: Final = 32
LEARNING_RATE: Final = 2e-3
MUON_RATE: Final = 2.5e-2
MUON_BATCH: Final = 8
MEASURED: Final = 2_000
"""About how many images the factor of the latents, and the error, are measured on."""
KL_WEIGHT: Final = 1e-3
"""Weight of an image's KL divergence in nats, added to its squared error summed over pixels in [-1, 1].

With thirty times this weight, three of the four channels and the empty margin become noise, and a small transformer
needs more steps to learn the digits.
"""


def build(channels: int = 4) -> AutoencoderKL:
    """An untrained autoencoder of a quarter of a million weights: 3x32x32 to Cx8x8."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=channels,
        sample_size=SIZE,
    )


def loss(model: AutoencoderKL, pixels: Tensor, edges: bool = False) -> tuple[Tensor, Tensor]:
    """Squared error and KL divergence, each summed over an image and averaged over the batch.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        edges: add the squared error of the differences between neighbours, which are the most of a photograph's detail
            and little of its squared error.
    """
    posterior = model.encode(pixels).latent_dist
    error = model.decode(posterior.sample()).sample - pixels
    terms = [error, error.diff(dim=2), error.diff(dim=3)] if edges else [error]
    return torch.stack([term.square().sum((1, 2, 3)).mean() for term in terms]).sum(), posterior.kl().mean()


def muon(model: nn.Module) -> list[Optimizer]:
    """Muon for the weights, with kernels of convolutions as rows of a matrix, and AdamW for norms and biases."""
    rows, rest = [], []
    for parameter in model.parameters():
        if parameter.ndim == 1:
            rest.append(parameter)
            continue
        parameter.grad = torch.zeros_like(parameter)
        rows.append(nn.Parameter(parameter.detach().flatten(1)))
        rows[-1].grad = parameter.grad.flatten(1)
    for_weights = Muon(rows, MUON_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [for_weights, AdamW(rest, 2 * LEARNING_RATE, weight_decay=0.0)]


def train(model: AutoencoderKL, images: NDArray[np.uint8], steps: int = STEPS, photographs: bool = False) -> None:
    """Fit the model to uint8 images (N, H, W, 3), and their mirror images, in random batches.

    Photographs need details, of low variance, which AdamW learns last: after a minute it is at 24 dB where Muon
    (Jordan 2024) is at 30. The demo's own file is from before that, by AdamW.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    pixels = torch.cat([pixels, pixels.flip(3)])
    batch = MUON_BATCH if photographs else BATCH
    optimizers = muon(model) if photographs else [AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)]
    schedules = [OneCycleLR(each, each.defaults["lr"], steps, pct_start=0.05) for each in optimizers]
    for step in range(steps):
        chosen = pixels[torch.randint(len(pixels), (batch,))] / 127.5 - 1
        error, divergence = loss(model, chosen, edges=photographs)
        model.zero_grad(set_to_none=False)
        (error + KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        for each in (*optimizers, *schedules):
            each.step()
        if step % 100 == 0:
            logging.info("step %d: squared error %.2f, KL %.1f nats", step, error.item(), divergence.item())


@torch.inference_mode()
def latent_scale(model: AutoencoderKL, images: NDArray[np.uint8]) -> dict[str, float]:
    """The shift and the factor that give posterior samples mean 0 and standard deviation 1 over all channels."""
    posterior = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    variance = posterior.mean.var(correction=0) + posterior.var.mean()
    return {
        "shift_factor": round(float(posterior.mean.mean()), 5),
        "scaling_factor": round(float(variance.rsqrt()), 5),
    }


def reconstruction_psnr(vae: Vae, images: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB over all uint8 images (N, H, W, 3), decoded from their posterior means."""
    mean, _ = vae.encode(torch.from_numpy(images))
    decoded = vae.decode((mean - vae.shift_factor) * vae.scaling_factor)
    error = np.square(decoded.numpy().astype(np.float64) - images).mean()
    return float(10 * np.log10(255**2 / error))


def save(model: AutoencoderKL, folder: Path) -> None:
    """Write the weights in half precision, and the config without diffusers' private fields, such as paths."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    document = {"_class_name": "AutoencoderKL"} | config
    uri.write(str(folder / CONFIG), json.dumps(document, indent=2, sort_keys=True).encode() + b"\n")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    uri.write(str(folder / WEIGHTS), safetensors.torch.save(weights, metadata={"format": "pt"}))


def archive_images(url: str) -> NDArray[np.uint8]:
    """All images of an archive, cropped to 32 pixels: (N, 32, 32, 3).

    Raises:
        InputError, StorageError, UnreadableImage: the archive or an image cannot be read.
    """
    archive = open_archive(url)
    return np.stack([load(archive.read(member), SIZE) for member in archive.members])


def some(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every image of a small set, evenly spaced ones of a large one."""
    return images[:: max(1, len(images) // MEASURED)]


def main() -> None:
    """Train, save and measure."""
    parser = argparse.ArgumentParser(description="Train a small autoencoder of images of 32 pixels.")
    parser.add_argument("--train", help="archive of training images (default: the demo's digits)")
    parser.add_argument("--held-out", help="archive of held-out images; with --train")
    parser.add_argument("--folder", type=Path, default=VAE, help="where to write it (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=4, help="channels of the latents (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    options = parser.parse_args()
    if (options.train is None) != (options.held_out is None):
        parser.error("name both archives, --train and --held-out, or neither")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(SEED)
    images, held_out = (
        archive_images(url) if url else digit_images(split)[0]
        for url, split in ((options.train, "train"), (options.held_out, "held_out"))
    )
    model, start = build(channels=options.channels), time.perf_counter()
    train(model, images, options.steps, photographs=options.train is not None)
    seconds = time.perf_counter() - start
    model.register_to_config(**latent_scale(model, some(images)))
    save(model, options.folder)
    vae = load_vae(VaeRef(source=str(options.folder)))
    metrics = {
        "held_out_psnr_db": round(reconstruction_psnr(vae, some(held_out)), 2),
        "sha256": vae.sha256,
        "train_seconds": round(seconds, 1),
    }
    uri.write(str(options.folder / METRICS), json.dumps(metrics, indent=2).encode() + b"\n")
    logging.info("%s: %s", options.folder, metrics)


if __name__ == "__main__":
    main()
