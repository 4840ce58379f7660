"""Sampling with guidance and decoding, against diffusers' pipeline with the same weights and steps."""

# B = batch, C = latent channels, h = latent side

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import Tensor

from benchmarks.common import Measured, Result, seconds
from benchmarks.peer import diffusers_dit, set_differences
from dit.devices import device
from dit.diffusion.config import DiffusionConfig
from dit.export import ModelCard, Trained
from dit.models.config import DiTConfig, dit_config
from dit.models.dit import DiT
from dit.sample import compiled, draw
from dit.samplers.config import SampleConfig
from dit.vae import Vae
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


def sampling(task: Task) -> Measured:
    """Images per second, the fastest of the interleaved rounds after a warm-up.

    Raises:
        ValueError: the networks' outputs differ.
    """
    model, vae = _model(task.model), _autoencoder(task)
    stock = DiTPipeline(set_differences(diffusers_dit(model)).eval(), vae, DDIMScheduler()).to(device())
    stock.set_progress_bar_config(disable=True)
    _compare(model, stock)
    labels = list(range(task.images))
    contestants: dict[str, Callable[[], object]] = {
        "sampling_diffusers": lambda: stock(
            labels, guidance_scale=SCALE, num_inference_steps=task.steps, output_type="np"
        ),
        "sampling": _ours(task, model, vae, compile=False),
        "sampling_compiled": _ours(task, model, vae, compile=True),
    }
    for work in contestants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(task.rounds):
        for name, work in contestants.items():
            times[name].append(seconds(work))
    speeds = {name: task.images / min(found) for name, found in times.items()}
    ratios = {ratio: speeds[name] / speeds["sampling_diffusers"] for ratio, name in RATIOS.items()}
    return [Result(name, speed, "images/s") for name, speed in speeds.items()], ratios


def _ours(task: Task, model: DiT, vae: AutoencoderKL, *, compile: bool) -> Callable[[], object]:
    """Sampling a batch as the stage does it."""
    info = VaeInfo(source="", sha256="", downsample=_downsample(task), channels=4, scaling_factor=0.18215)
    card = ModelCard(
        model=model.config,
        diffusion=DiffusionConfig(),
        vae=info,
        resolution=model.config.input_size * info.downsample,
        class_names=tuple(map(str, range(model.config.num_classes))),
        steps=0,
    )
    config = SampleConfig(
        sampler="ddim", steps=task.steps, guidance_scale=SCALE, guidance_channels="all", compile=compile
    )
    decoder = deepcopy(vae).to(device(), memory_format=torch.channels_last)
    ready, trained = Vae(decoder, **info.model_dump(exclude={"source"})), Trained(deepcopy(model), card)
    trained, indices = compiled(config, trained), range(task.images)
    return lambda: draw(config, trained, ready, indices, torch.arange(task.images))


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


def _downsample(task: Task) -> int:
    return int(2 ** (len(task.widths) - 1))


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
