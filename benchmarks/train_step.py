"""A training step of DiT, against diffusers' DiT and a minimal one in a plain loop with the same data and weights.

Also the same of SiT, which is a DiT that is trained as a flow, what LightningDiT's options cost in a step, and what a
whole run costs beside its steps: see `benchmarks.training`.
"""

# B = batch, C = channels, H = W = side of the latent

import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import common, training
from benchmarks.common import Measured, Result, main
from benchmarks.minimal import MinimalDiT
from benchmarks.peer import diffusers_dit, set_differences
from dit.devices import device
from dit.diffusion.build import build_process
from dit.diffusion.config import DiffusionConfig, FlowConfig, ProcessConfig
from dit.diffusion.process import Denoiser, Process
from dit.models.config import LIGHTNING, BackboneOptions, DiTConfig, dit_config
from dit.models.cost import cost
from dit.models.dit import DiT
from dit.ranks import Ranks
from dit.training.data import Batch
from dit.training.ema import EMA
from dit.training.loop import StepConfig, TrainState, train
from dit.training.per_block import choose_attention, compile_blocks
from dit.training.throughput import matmul_speed

LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
"""Largest relative difference of a first loss from that of the plain float32 step."""
TERA, GIB = 1e12, 2**30


@dataclass(frozen=True)
class Task:
    """What every contestant trains on, and the number of timed steps."""

    config: DiTConfig
    batch_size: int
    rounds: int
    diffusion: ProcessConfig = field(default_factory=DiffusionConfig)

    @property
    def process(self) -> Process:
        """What the model learns to reverse."""
        return build_process(self.diffusion, device())


S1 = dit_config("S/1", input_size=16, in_channels=32, learn_variance=False)
"""As LightningDiT-S/1, without its options."""
SIT = dit_config("S/2", learn_variance=False)
"""As the network of SiT-S/2, without the outputs that it does not use."""
CPU_TASKS = {
    "S/2": Task(dit_config("S/2"), 2, 5),
    "S/2-16": Task(dit_config("S/2"), 16, 3),
    "B/2": Task(dit_config("B/2"), 1, 2),
    "SiT-S/2": Task(SIT, 2, 5, FlowConfig()),
}
GPU_TASKS = {
    **{name: Task(dit_config(name), size, 20) for name, size in {"S/2": 128, "B/2": 64, "L/2": 24, "XL/2": 16}.items()},
    "SiT-S/2": Task(SIT, 128, 20, FlowConfig()),
}


@dataclass(frozen=True)
class Contestant:
    """A way to train, with its state."""

    step: Callable[[], Tensor]
    """Takes a step and returns its loss."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: list[Tensor]

    def held(self) -> int:
        """Bytes of weights, moments and moving averages."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *moments, *self.averages])


def plain(model: DiT, batch: Batch, dtype: torch.dtype, process: Process) -> Contestant:
    """The model of diffusers in a plain loop."""
    peer = set_differences(diffusers_dit(model)).train().to(batch.x0.device)

    def denoise(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        out: Tensor = peer(x, timestep=t, class_labels=y).sample
        return out

    return plain_loop(peer, denoise, batch, dtype, process)


def minimal(model: DiT, batch: Batch, dtype: torch.dtype, process: Process) -> Contestant:
    """A hundred lines of torch in a plain loop."""
    peer = MinimalDiT(model.config).to(batch.x0.device)
    peer.load_state_dict(model.state_dict())
    return plain_loop(peer, peer, batch, dtype, process)


def plain_loop(peer: nn.Module, denoise: Denoiser, batch: Batch, dtype: torch.dtype, process: Process) -> Contestant:
    """Eager steps with torch's own AdamW, and an EMA in a loop over the parameters."""
    average = deepcopy(peer).requires_grad_(False)
    optimizer = torch.optim.AdamW(peer.parameters(), LEARNING_RATE, weight_decay=0)

    def step() -> Tensor:
        with torch.autocast(batch.x0.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            terms = process.training_terms(denoise, batch.x0, batch.noise, process.sample_t(batch.u), batch.y)
        loss = terms["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averages = dict(average.named_parameters())
        with torch.no_grad():
            for name, parameter in peer.named_parameters():
                averages[name].mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)
        return loss.detach()

    return Contestant(step, peer, optimizer, list(average.parameters()))


def ours(model: DiT, batch: Batch, dtype: torch.dtype, process: Process, compiled: bool) -> Contestant:
    """The steps of `dit.training.loop`, with each block compiled or in eager mode."""
    model, autocast = deepcopy(model), None if dtype is torch.float32 else dtype
    choose_attention(model, autocast)
    if compiled:
        compile_blocks(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0, fused=True)
    state = TrainState(model, {"ema": EMA(model, EMA_DECAY)}, optimizer)
    step_config = StepConfig(lambda _: LEARNING_RATE, autocast=autocast)
    steps = train(state, process, lambda step: batch, step_config, stop=10**9, ranks=Ranks())
    averages = list(state.averages["ema"].state_dict().values())
    return Contestant(lambda: next(steps).terms["loss"], model, optimizer, averages)


def with_options(
    model: DiT, batch: Batch, dtype: torch.dtype, process: Process, *, compiled: bool = True, **options: Any
) -> Contestant:
    """Our steps of a model with other backbone options, and weights of its own."""
    return ours(_model(model.config.model_copy(update=options)), batch, dtype, process, compiled)


Contestants = dict[str, tuple[torch.dtype, Callable[[DiT, Batch, torch.dtype, Process], Contestant]]]
Ratios = dict[str, tuple[str, str]]
"""Ratio name to two contestants: images per second of the second, divided by those of the first."""

CONTESTANTS: Contestants = {
    "plain_fp32": (torch.float32, plain),
    "plain_autocast": (torch.bfloat16, plain),
    "minimal_fp32": (torch.float32, minimal),
    "minimal_autocast": (torch.bfloat16, minimal),
    "ours_fp32_eager": (torch.float32, partial(ours, compiled=False)),
    "ours_fp32": (torch.float32, partial(ours, compiled=True)),
    "ours_bf16": (torch.bfloat16, partial(ours, compiled=True)),
}
"""Those of ours are compiled unless the name says otherwise."""

RATIOS: Ratios = {
    "vs_fp32": ("plain_fp32", "ours_bf16"),
    "vs_autocast": ("plain_autocast", "ours_bf16"),
    "fp32_vs_fp32": ("plain_fp32", "ours_fp32"),
    "fp32_vs_autocast": ("plain_autocast", "ours_fp32"),
    "fp32_eager_vs_fp32": ("plain_fp32", "ours_fp32_eager"),
    "vs_minimal_autocast": ("minimal_autocast", "ours_bf16"),
    "fp32_vs_minimal": ("minimal_fp32", "ours_fp32"),
}

OF_LIGHTNING = {name: value for name, value in LIGHTNING.items() if name in BackboneOptions.model_fields}
OPTIONS: dict[str, dict[str, Any]] = {
    "rms": {"norm": "rms"},
    "swiglu": {"mlp": "swiglu"},
    "rope": {"rope": True},
    "qk_norm": {"qk_norm": True},
    "lightning": OF_LIGHTNING,
    "lightning_eager": {**OF_LIGHTNING, "compiled": False},
}
BACKBONES: dict[torch.dtype, Contestants] = {
    dtype: {
        "plain": (dtype, plain),
        "dit": (dtype, partial(ours, compiled=True)),
        "dit_eager": (dtype, partial(ours, compiled=False)),
        **{name: (dtype, partial(with_options, **options)) for name, options in OPTIONS.items()},
    }
    for dtype in TOLERANCE
}
BACKBONE_RATIOS: Ratios = {
    "dit_vs_plain": ("plain", "dit"),
    "lightning_vs_plain": ("plain", "lightning"),
    **{f"{name}_vs_dit": ("dit_eager" if name.endswith("eager") else "dit", name) for name in OPTIONS},
}


def measure() -> Measured:
    """Measure every size that this machine trains in minutes, the options, then whole runs of the smallest."""
    results: list[Result] = []
    ratios: dict[str, float] = {}
    gpu = torch.cuda.is_available()
    contests = [(name, task, CONTESTANTS, RATIOS) for name, task in (GPU_TASKS if gpu else CPU_TASKS).items()]
    options = Task(S1, 128, 20) if gpu else Task(S1, 2, 5)
    contests += [(f"S/1_{_short(dtype)}", options, those, BACKBONE_RATIOS) for dtype, those in BACKBONES.items()]
    for name, task, contestants, those in contests:
        label = name.replace("/", "").replace("-", "_").lower()
        found, compared = contest(task, contestants, those)
        results += [Result(f"{label}_{result.name}", result.value, result.unit) for result in found]
        ratios |= {f"{label}_{ratio}": value for ratio, value in compared.items()}
    beside, scaling = training.measure()
    return results + beside, ratios | scaling


def contest(task: Task, contestants: Contestants = CONTESTANTS, ratios: Ratios = RATIOS) -> Measured:
    """Time every contestant: in turns on a CPU, one after another on a GPU, whose memory does not hold them all.

    Ratios and rates use the fastest step of each, because other work on the machine only adds time. The peak of the
    machine is that of matrix products timed in between.

    Raises:
        ValueError: the first loss of a contestant with the same network is not that of the first contestant.
    """
    torch.compiler.reset()  # else all sizes together exceed the limit of recompilations
    model, batch, process = _model(task.config), _batch(task), task.process
    names = list(contestants)
    peaks = dict.fromkeys(TOLERANCE, 0.0)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    losses: dict[str, float] = {}
    for group in [[name] for name in names] if torch.cuda.is_available() else [names]:
        running = {name: make(model, batch, dtype, process) for name in group for dtype, make in [contestants[name]]}
        losses |= {name: contestant.step().item() for name, contestant in running.items()}
        memory |= {name: peak_memory(contestant) for name, contestant in running.items()}
        for _ in range(task.rounds):
            for name, contestant in running.items():
                seconds.setdefault(name, []).append(common.seconds(contestant.step))
            peaks = {dtype: max(peak, matmul_speed(dtype, device())) for dtype, peak in peaks.items()}
        del running, contestant  # frees memory before the next is made
    check_losses({name: loss for name, loss in losses.items() if name not in OPTIONS}, contestants)
    results = [Result(f"matmul_{_short(dtype)}", peak / TERA, "TFLOP/s") for dtype, peak in peaks.items()]
    results += [Result(f"{name}_loss", loss, "first step") for name, loss in losses.items()]
    for name in names:
        results += _figures(name, task, seconds[name], memory[name], peaks[contestants[name][0]])
    best = {name: min(times) for name, times in seconds.items()}
    return results, {ratio: best[peer] / best[mine] for ratio, (peer, mine) in ratios.items()}


def check_losses(losses: dict[str, float], contestants: Contestants = CONTESTANTS) -> None:
    """Check that all contestants computed the same first loss.

    Raises:
        ValueError: one differs by more than the tolerance of its precision.
    """
    expected = next(iter(losses.values()))
    for name, loss in losses.items():
        tolerance = TOLERANCE[contestants[name][0]]
        if not abs(loss - expected) <= tolerance * abs(expected):
            raise ValueError(f"{name}: first loss {loss} is not within {tolerance:g} of {expected}")


def peak_memory(contestant: Contestant) -> int:
    """Peak bytes during a step, including the state."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        contestant.step()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        contestant.step()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [int(event.nbytes()) for event in sorted(events, key=lambda event: event.start_ns())]
    return contestant.held() + max(accumulate(changes))


def _figures(name: str, task: Task, times: list[float], memory: int, peak: float) -> list[Result]:
    best = min(times)
    flops = cost(task.config).training_flops * task.batch_size / best
    return [
        Result(f"{name}_median", statistics.median(times), "s"),
        Result(f"{name}_best", best, "s"),
        Result(f"{name}_speed", task.batch_size / best, "images/s"),
        Result(f"{name}_work", flops / TERA, "TFLOP/s"),
        Result(f"{name}_mfu", 100 * flops / peak, "%"),
        Result(f"{name}_memory", memory / GIB, "GiB"),
    ]


def _model(config: DiTConfig) -> DiT:
    """With random weights where training starts at zero: models that predict zero would have equal losses anyway."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiT(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.to(device())


def _batch(task: Task) -> Batch:
    generator = torch.Generator().manual_seed(1)
    config, count = task.config, task.batch_size
    shape = count, config.in_channels, config.input_size, config.input_size
    x0, noise = (torch.randn(shape, generator=generator).to(device()) for _ in range(2))
    u = torch.rand(count, generator=generator, dtype=torch.float64).to(device())
    y = torch.randint(config.num_classes + 1, (count,), generator=generator).to(device())
    return Batch(x0, noise, u, y)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


if __name__ == "__main__":
    main(measure, __doc__)
