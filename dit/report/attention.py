"""Where the blocks of a DiffiT look while they make an image (Hatamizadeh et al., arXiv 2312.02139, figure 7).

The first samples are made once more from their noise and labels, by a deterministic sampler in a few steps and without
guidance. On the way the first, the middle and the last attention layer give the weights w of each query i and key j in
each head, for the tokens and conditions that reach them (`dit.models.tmsa.TMSA.weights`). Of these weights

    received    the sum of w over the queries, in the mean over heads: 1 everywhere, if all keys are alike
    tokens      exp(-sum_j w log w), the tokens that a query looks at: 1 to K, in the geometric mean
    distance    the mean of |place of i - place of j| under w, in tokens
    changed     sum_j |w - w'| / 2, where w' are the weights at the beginning of the way: the share of the attention
                that is elsewhere now
    moved       the same, where w' are the weights for the tokens as they are now, but with the condition of the
                beginning: the share that is elsewhere because of the time itself

Where the condition is a token (`condition: token`), it counts among the K; distance is that to the image's tokens.
"""

# B = samples, T = steps of the way that are shown, W = windows in an image, N = tokens in a window = w * w
# K = tokens that are attended to, D = width, E = width of the condition, h = heads, H = tokens along an image's side

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import exp, isqrt
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor, nn

from dit.devices import arithmetic, device
from dit.diffusion.config import DiffusionConfig, EDMConfig, ProcessConfig
from dit.export import CheckpointManifest, Trained, load, weights_file
from dit.metrics.comparison import Estimate
from dit.models.config import DiffiTConfig, DiffiTImageConfig
from dit.models.diffit_image import from_windows
from dit.models.tmsa import TMSA
from dit.sample import SampleManifest, decoded, open_decoder
from dit.samplers.config import SampleConfig
from dit.samplers.guidance import UNGUIDED
from dit.samplers.noise import SampleNoise
from dit.samplers.table import QUICK, sampler
from storage.rows.store import RowReader

STEPS: Final = 15
SHOWN: Final = 8
"""T, how many of these steps are shown."""
SAMPLES: Final = 8
"""B, unless there are fewer."""
SHARES: Final = ("changed", "moved")
NUMBERS: Final = ("tokens", "distance", *SHARES)


@dataclass(frozen=True)
class Layer:
    """The attention of one layer on the way."""

    name: str
    """Which one it is, and its tokens."""
    received: NDArray[np.float32]
    """(T, H, H) of the first sample, with the windows at their places in the image."""
    numbers: Mapping[str, NDArray[np.float64]]
    """`NUMBERS`, each (T, B)."""

    def estimates(self, number: str) -> list[Estimate]:
        """The mean over the samples at each step, with its 95 % interval if there are several."""
        return [_mean(values) for values in self.numbers[number]]


@dataclass(frozen=True)
class Attention:
    """The attention of a model on the way from noise to images."""

    way: str
    """The sampler and its steps."""
    samples: int
    """B."""
    times: list[str]
    """The noise level, timestep or time of each step, T of them."""
    noisy: NDArray[np.uint8]
    """The first sample on its way (T, side, side, 3), decoded if it is a latent."""
    expected: NDArray[np.uint8]
    """What the model expects it to become, likewise."""
    layers: list[Layer]
    """In the order of the network."""


class Given(NamedTuple):
    """What reaches a layer: tokens (B * W, N, D), the windows of an image next to each other, and conditions (B, E)."""

    x: Tensor
    c: Tensor

    def images(self) -> list["Given"]:
        """That of each image."""
        windows = len(self.x) // len(self.c)
        return [Given(*each) for each in zip(self.x.split(windows), self.c.split(1), strict=True)]


@dataclass(frozen=True)
class _Step:
    """What the network is given in a step, x (B, C, H, W) and t (B,), and the data it expects."""

    x: Tensor
    t: Tensor
    x0: Tensor


@torch.no_grad()
def attention(samples: SampleManifest) -> Attention | None:
    """The attention on the way of the first samples; None if the model has no such attention.

    Raises:
        InputError: the model or its decoder are missing.
        StorageError: a file is not what was committed.
    """
    checkpoint = samples.parent("checkpoint", CheckpointManifest)
    process, model = checkpoint.card.diffusion, checkpoint.card.model
    if not isinstance(model, DiffiTConfig | DiffiTImageConfig):
        return None
    config = _quick(SampleConfig.model_validate(samples.config), process)
    trained = load(checkpoint.uri, weights=weights_file(config.weights), device=device())
    indices = range(min(SAMPLES, samples.counts["images"]))
    labels = torch.from_numpy(RowReader(samples).take("label", np.array(indices))).long().to(device())
    y = labels if model.num_classes else None
    with arithmetic(config.precision):
        way = _way(config, trained, indices, y)
        layers = _layers(trained.model, way, y)
        noisy, expected = _images(config, trained, way)
    times = [_named(float(step.t[0]), process) for step in way]
    return Attention(f"{config.sampler} in {config.steps} steps", len(indices), times, noisy, expected, layers)


def _quick(config: SampleConfig, process: ProcessConfig) -> SampleConfig:
    """The same samples by a deterministic sampler in a few steps, without guidance."""
    steps = min(STEPS, process.steps) if isinstance(process, DiffusionConfig) else STEPS
    way = {"sampler": QUICK[process.kind], "steps": steps, "eta": 0.0}
    return config.model_copy(update=way | {"guidance_scale": UNGUIDED, "guide": None, "precision": "float32"})


def _named(t: float, process: ProcessConfig) -> str:
    """A time that the network is given, as people name it."""
    if isinstance(process, EDMConfig):
        return f"sigma {exp(4 * t):.3g}"
    return f"t {t:.0f}" if isinstance(process, DiffusionConfig) else f"t {t:.2f}"


def _way(config: SampleConfig, trained: Trained, indices: range, y: Tensor | None) -> list[_Step]:
    """Steps from noise to data, evenly spread over the way, the first and the last included."""
    model, process, given = trained.card.model, trained.card.diffusion, list[tuple[Tensor, Tensor]]()
    noise = SampleNoise(config.seed, indices, (model.in_channels, model.input_size, model.input_size), device())

    def watched(x: Tensor, t: Tensor, y: Tensor | None, /) -> Tensor:
        given.append((x, t))
        out: Tensor = trained.model(x, t, y)
        return out

    steps = list[_Step]()
    for state in sampler(config, process).states(config, process, watched, y, noise):
        steps.append(_Step(*given[0], state.x0))  # a second pass corrects the step
        given.clear()
    shown = np.linspace(0, len(steps) - 1, min(SHOWN, len(steps))).round().astype(int)
    return [steps[step] for step in shown]


def _layers(model: nn.Module, way: Sequence[_Step], y: Tensor | None) -> list[Layer]:
    """The first, the middle and the last layer on the way."""
    total = sum(isinstance(module, TMSA) for module in model.modules())
    chosen = sorted({0, total // 2, total - 1})
    steps, first = [], _seen(model, way[0], y, chosen)
    for step in way:
        seen = _seen(model, step, y, chosen)
        steps.append([measured(*now, before) for now, (_, before) in zip(seen, first, strict=True)])
    return [
        Layer(
            f"layer {place + 1} of {total}: {_tokens(*first[row])}",
            np.stack([step[row][0] for step in steps]),
            {name: np.stack([step[row][1][name] for step in steps]) for name in NUMBERS},
        )
        for row, place in enumerate(chosen)
    ]


def _seen(model: nn.Module, step: _Step, y: Tensor | None, chosen: Sequence[int]) -> list[tuple[TMSA, Given]]:
    """The chosen layers with what reaches them in a step."""
    found, calls = list[tuple[TMSA, Given]](), count()

    def keep(layer: nn.Module, given: tuple[Tensor, Tensor]) -> None:
        if next(calls) in chosen and isinstance(layer, TMSA):
            found.append((layer, Given(*given)))

    hooks = [module.register_forward_pre_hook(keep) for module in model.modules() if isinstance(module, TMSA)]
    model(step.x, step.t, y)
    for hook in hooks:
        hook.remove()
    return found


def _tokens(layer: TMSA, given: Given) -> str:
    """The tokens of a layer in words."""
    window, windows = layer.bias.window, len(given.x) // len(given.c)
    side = isqrt(windows) * window
    return f"{side} x {side} tokens" + (f" in windows of {window} x {window}" if windows > 1 else "")


def measured(layer: TMSA, now: Given, before: Given) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float64]]]:
    """What the first image's tokens receive now (H, H), and the `NUMBERS` of each image (B,).

    Args:
        layer: the attention.
        now: what reaches it.
        before: what reached it at the beginning of the way.
    """
    pairs = list(zip(now.images(), before.images(), strict=True))  # an image at a time, to save memory
    window = layer.bias.window
    received = _received(layer.weights(*pairs[0][0]))
    side = isqrt(len(received)) * window
    each = [_numbers(layer, *pair) for pair in pairs]
    numbers = {name: np.array([found[name] for found in each]) for name in NUMBERS}
    return from_windows(received[:, :, None], window, side, side)[0, 0].float().cpu().numpy(), numbers


def _received(weights: Tensor) -> Tensor:
    """What each of the image's tokens gets of all queries, in the mean over heads: (W, h, N, K) to (W, N)."""
    return weights[..., : weights.shape[2]].sum(2).mean(1)


def _numbers(layer: TMSA, now: Given, before: Given) -> dict[str, float]:
    """The `NUMBERS` of one image."""
    weights = layer.weights(*now)
    own = weights[..., : weights.shape[2]]
    far = (own * _distances(layer.bias.window, own.device)).sum(-1) / own.sum(-1)
    others = {"changed": layer.weights(*before), "moved": layer.weights(now.x, before.c)}
    shares = {name: float((weights - other).abs().sum(-1).mean() / 2) for name, other in others.items()}
    return {"tokens": float(torch.special.entr(weights).sum(-1).mean().exp()), "distance": float(far.mean())} | shares


def _distances(window: int, on: torch.device) -> Tensor:
    """Distances (N, N) between the places of a window, in tokens."""
    line = torch.arange(window, dtype=torch.float32, device=on)
    places = torch.cartesian_prod(line, line)
    return torch.cdist(places, places)


def _images(
    config: SampleConfig, trained: Trained, way: Sequence[_Step]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The first sample on its way, and what the model expects it to become: (T, side, side, 3)."""
    card = trained.card
    vae = open_decoder(config, card)
    scale = card.diffusion.sigma_data if isinstance(card.diffusion, EDMConfig) else 1.0  # EDM's input has variance 1
    noisy, expected = (torch.cat(parts) for parts in zip(*((s.x[:1] * scale, s.x0[:1]) for s in way), strict=True))
    return decoded(config, card, vae, noisy).numpy(), decoded(config, card, vae, expected).numpy()


def _mean(values: NDArray[np.float64]) -> Estimate:
    """The mean of independent values with its 95 % interval, after Student's distribution."""
    mean, freedom = float(values.mean()), len(values) - 1
    if not freedom:
        return Estimate(mean)
    margin = float(stdtrit(freedom, 0.975) * values.std(ddof=1) / len(values) ** 0.5)
    return Estimate(mean, mean - margin, mean + margin)
