"""How fast training goes, and what of the time it waits."""

import time
from dataclasses import dataclass, field

import psutil
import torch

from dit.models.config import ModelConfig
from dit.models.cost import cost
from storage.config import Config

TERA, MEGA, GIB = 1e12, 1e6, 2**30
PEAK_TRIES = 4


class Measured(Config):
    """What was measured at one logged step."""

    step: int
    """Optimizer steps taken, that one included."""
    values: dict[str, float]
    """The loss, its parts and the norm of the gradient, of the whole batch."""


@dataclass
class Watch:
    """Measures the stretches of training between two records, on the first rank, for all."""

    model: ModelConfig
    batch_size: int
    """Of all ranks together."""
    world_size: int
    device: torch.device
    dtype: torch.dtype
    """Of the matrix products."""
    _began: tuple[int, float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._flops = cost(self.model).training_flops
        gpu = self.device.type == "cuda"
        self._peak = self.world_size * matmul_speed(self.dtype, self.device) if gpu else None

    def begin(self, step: int) -> None:
        """Begin after so many steps."""
        self._began = step, time.perf_counter(), 0.0
        psutil.cpu_percent()  # since the call before

    def measure(self, step: int, waited: float) -> dict[str, float]:
        """Rates since the last record, and begin anew.

        Args:
            step: steps taken.
            waited: seconds that steps have waited for their batches, since the beginning.
        """
        (before, began, had_waited), now = self._began, time.perf_counter()
        self._began = step, now, waited
        speed = (step - before) * self.batch_size / (now - began)
        flops = speed * self._flops
        found = {
            "images_per_second": speed,
            "tflops": flops / TERA,
            "data_wait_share": (waited - had_waited) / (now - began),
        }
        if self.model.kind != "diffit_image":
            found["tokens_per_second"] = speed * self.model.grid**2
        if self._peak is not None:
            found["mfu"] = flops / self._peak
        return found | {"memory_gib": memory(self.device) / GIB} | system(self.device)


def memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU; what the process holds on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def system(device: torch.device) -> dict[str, float]:
    """The machine's load, as MLflow names a system's metrics; that of processors is since the last call."""
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGA,
        "system_memory_usage_percentage": memory.percent,
        "network_receive_megabytes": network.bytes_recv / MEGA,
        "network_transmit_megabytes": network.bytes_sent / MEGA,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found[f"gpu_{device.index}_memory_usage_megabytes"] = (total - free) / MEGA
        found[f"gpu_{device.index}_memory_usage_percentage"] = 100 * (1 - free / total)
    return {f"system/{name}": value for name, value in found.items()}


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large matrix product, the fastest of some: what stands for the device's peak."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(PEAK_TRIES):
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best
