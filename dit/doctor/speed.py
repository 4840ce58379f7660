"""How fast this machine trains, as a share of what its processors can do."""

import torch

from dit.devices import Arithmetic, device, dtype
from dit.doctor.devices import described
from dit.models.config import dit_config
from dit.ranks import cores
from dit.rates import training_rate
from dit.training.throughput import TERA, matmul_speed
from storage.finding import Finding, ok, skipped, warning

STEPS: dict[str, tuple[str, int, Arithmetic]] = {"cuda": ("XL/2", 64, "bfloat16"), "cpu": ("S/2", 8, "float32")}
"""Model, batch and precision. A CPU without instructions for bfloat16 takes minutes for a product in it."""
LEAST_MFU = 0.15
"""Of a GPU, with uncompiled blocks; fused attention and no other work on the GPU have about twice as much."""
SPREAD = 0.9
"""The slowest GPU of a machine, as a part of the fastest."""


def mfu() -> Finding:
    """Model FLOPs utilisation: the FLOP a second of a training step, as a share of those of a matrix product.

    Measured on two of DiT's blocks, without compilation; on a GPU in bfloat16.
    """
    where = device()
    torch.set_num_threads(cores())
    name, batch, precision = STEPS[where.type]
    rate, peak = training_rate(dit_config(name), batch, precision), matmul_speed(dtype(precision), where)
    share = f"{rate / TERA:.3g} of {peak / TERA:.3g} TFLOP/s, MFU {rate / peak:.0%}"
    seen = f"DiT-{name} in {precision} on {described()}: {share}"
    if where.type == "cuda" and rate / peak < LEAST_MFU:
        return warning(seen, "see whether other processes use this GPU (nvidia-smi), and which attention kernel runs")
    return ok(seen)


def every_gpu() -> Finding:
    """Matrix products in bfloat16 on each GPU of this machine: ranks wait for the slowest."""
    if not torch.cuda.is_available():
        return skipped("no GPU")
    speeds = [matmul_speed(torch.bfloat16, torch.device("cuda", each)) for each in range(torch.cuda.device_count())]
    seen = f"matrix products of each GPU: {', '.join(f'{speed / TERA:.0f}' for speed in speeds)} TFLOP/s"
    slow = [f"{index}" for index, speed in enumerate(speeds) if speed < SPREAD * max(speeds)]
    if slow:
        return warning(f"{seen}; GPU {', '.join(slow)} is slow", "see who uses it and whether it is hot: nvidia-smi")
    return ok(seen)
