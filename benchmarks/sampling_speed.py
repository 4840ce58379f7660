"""Sampling with guidance and decoding, against diffusers' pipeline with the same weights and steps."""

# B = batch, C = latent channels, h = latent side

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import Tensor

from benchmarks.common import Measured, Result, main, seconds
from benchmarks.peer import diffusers_dit, set_differences, set_null_class
from dit.devices import device
from dit.diffusion.config import DiffusionConfig
from dit.export import ModelCard, Trained, load
from dit.models.config import DiTConfig, dit_config
from dit.models.dit import DiT
from dit.sample import compiled, draw
from dit.samplers.config import SampleConfig
from dit.vae import Vae, load_vae
from storage.latents import VaeInfo

SCALE = 1.5
TOLERANCE = 1e-4
"""Largest relative difference between the networks' outputs."""
RATIOS = {"sampling_vs_diffusers": "sampling_compiled", "sampling_eager_vs_diffusers": "sampling"}


@dataclass(frozen=True)
class Task:
    """What is sampled, and how many times."""

    model: DiTConfig
    widths: tuple[int, ...]
    """Channels of the autoencoder at each resolution."""
    groups: int
    """Groups of the autoencoder's group norms."""
    images: int
    steps: int
    rounds: int


SMALL = Task(dit_config("S/2", input_size=16), (128, 256, 512, 512), 32, images=2, steps=20, rounds=2)
"""S/2 and Stable Diffusion's autoencoder at 128 px."""
TRAINED_IMAGES = 100
"""Images of a trained model in a batch."""


def sampling(task: Task) -> Measured:
    """A network and an autoencoder with made weights, in turns with the peer.

    Raises:
        ValueError: the networks' outputs differ.
    """
    downsample = int(2 ** (len(task.widths) - 1))
    info = VaeInfo(source="", sha256="", downsample=downsample, channels=4, scaling_factor=0.18215)
    card = ModelCard(
        model=task.model,
        diffusion=DiffusionConfig(),
        vae=info,
        resolution=task.model.input_size * info.downsample,
        class_names=tuple(map(str, range(task.model.num_classes))),
        steps=0,
    )
    vae = Vae(_autoencoder(task), **info.model_dump(exclude={"source"}))
    return contest(Trained(_model(task.model), card), vae, task.images, task.steps, task.rounds)


def measure(checkpoint: Path | None = None) -> Measured:
    """A trained model and its autoencoder, one batch of `TRAINED_IMAGES`; without one, `SMALL`.

    Raises:
        InputError: there is no such checkpoint, or its autoencoder is gone.
        ValueError: it is no DiT on latents, or the networks' outputs differ.
    """
    if checkpoint is None:
        return sampling(SMALL)
    trained = load(str(checkpoint), device=device())
    if trained.card.vae_ref is None or not isinstance(trained.model, DiT):
        raise ValueError(f"{checkpoint}: diffusers has a pipeline for a DiT on latents only")
    return contest(trained, load_vae(trained.card.vae_ref), TRAINED_IMAGES, SMALL.steps, SMALL.rounds)


def contest(trained: Trained, vae: Vae, images: int, steps: int, rounds: int) -> Measured:
    """Images per second, the fastest of the interleaved rounds after a warm-up.

    Args:
        trained: a DiT.
        vae: its autoencoder, on the CPU.
        images: images in a batch.
        steps: steps of DDIM.
        rounds: turns of each contestant.

    Raises:
        ValueError: the networks' outputs differ.
    """
    model = trained.model
    assert isinstance(model, DiT)
    theirs = deepcopy(vae.model).to(memory_format=torch.contiguous_format)
    stock = DiTPipeline(set_differences(diffusers_dit(model)).eval(), theirs, DDIMScheduler()).to(device())
    stock.set_progress_bar_config(disable=True)
    _compare(model, stock)
    set_null_class(stock.transformer)
    labels = [image % model.config.num_classes for image in range(images)]
    contestants: dict[str, Callable[[], object]] = {
        "sampling_diffusers": lambda: stock(labels, guidance_scale=SCALE, num_inference_steps=steps, output_type="np"),
        "sampling": _ours(trained, vae, labels, steps, compile=False),
        "sampling_compiled": _ours(trained, vae, labels, steps, compile=True),
    }
    for work in contestants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            times[name].append(seconds(work))
    speeds = {name: images / min(found) for name, found in times.items()}
    ratios = {ratio: speeds[name] / speeds["sampling_diffusers"] for ratio, name in RATIOS.items()}
    return [Result(name, speed, "images/s") for name, speed in speeds.items()], ratios


def _ours(trained: Trained, vae: Vae, labels: list[int], steps: int, *, compile: bool) -> Callable[[], object]:
    """Sampling a batch as the stage does it."""
    config = SampleConfig(sampler="ddim", steps=steps, guidance_scale=SCALE, guidance_channels="all", compile=compile)
    ready = replace(vae, model=deepcopy(vae.model).to(device(), memory_format=torch.channels_last))
    own = compiled(config, Trained(deepcopy(trained.model), trained.card))
    return lambda: draw(config, own, ready, range(len(labels)), torch.tensor(labels))


def _model(config: DiTConfig) -> DiT:
    """A network without zero weights."""
    model = DiT(config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    return model.requires_grad_(False).to(device())


def _autoencoder(task: Task) -> AutoencoderKL:
    halvings = len(task.widths)
    return AutoencoderKL(
        block_out_channels=task.widths,
        down_block_types=("DownEncoderBlock2D",) * halvings,
        up_block_types=("UpDecoderBlock2D",) * halvings,
        layers_per_block=2,
        norm_num_groups=task.groups,
    ).eval()


def _compare(model: DiT, stock: DiTPipeline) -> None:
    """Check that both networks have the same output."""
    side = model.config.input_size
    x: Tensor = torch.randn(2, model.config.in_channels, side, side, device=device())
    t, y = torch.tensor([10, 900], device=device()), torch.tensor([0, model.config.num_classes], device=device())
    with torch.no_grad():
        ours, theirs = model(x, t, y), stock.transformer(x, timestep=t, class_labels=y).sample
    apart = float((ours - theirs).norm() / theirs.norm())
    if not apart < TOLERANCE:
        raise ValueError(f"the networks disagree by {apart:.1e}")


if __name__ == "__main__":
    main(measure, __doc__, checkpoint="a trained DiT on latents, instead of S/2 with made weights")
