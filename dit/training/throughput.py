"""How fast training runs, and what share of the time it waits for data."""

import time
from dataclasses import dataclass, field

import psutil
import torch
from pydantic import Field

from dit.models.config import ModelConfig
from dit.models.cost import cost
from storage.config import Config

TERA, MEGA, GIB = 1e12, 1e6, 2**30
PEAK_TRIES = 4


class LoggedStep(Config):
    """What was measured at one logged step."""

    step: int
    """Optimizer steps taken, this one included."""
    values: dict[str, float]
    """Loss, its parts and gradient norm, over the global batch."""
    held_out: dict[str, float] = Field(default_factory=dict)
    """Loss on held-out images and standard errors, if they were measured; see `dit.training.held_out`."""
    conditions: str = ""
    """Digest of how ``held_out`` was measured, and on what."""


@dataclass
class ThroughputMeter:
    """Measures training between two log records, on the first rank for all ranks."""

    model: ModelConfig
    batch_size: int
    """Images in a step, over all ranks."""
    world_size: int
    device: torch.device
    dtype: torch.dtype
    """Dtype of the matrix products."""
    _began: tuple[int, float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._flops = cost(self.model).training_flops
        gpu = self.device.type == "cuda"
        self._peak = self.world_size * matmul_speed(self.dtype, self.device) if gpu else None

    def begin(self, step: int, waited: float = 0.0) -> None:
        """Start the clock after ``step`` steps, which have ``waited`` so many seconds for their batches."""
        self._began = step, time.perf_counter(), waited
        psutil.cpu_percent()  # the next call reports the load since this one

    def measure(self, step: int, waited: float) -> dict[str, float]:
        """Rates since the last record. The clock starts again.

        Args:
            step: steps taken.
            waited: seconds that steps have waited for their batches, since training began.
        """
        (last_step, last_time, last_waited), now = self._began, time.perf_counter()
        self._began = step, now, waited
        speed = (step - last_step) * self.batch_size / (now - last_time)
        flops = speed * self._flops
        rates = {
            "images_per_second": speed,
            "tflops": flops / TERA,
            "data_wait_share": (waited - last_waited) / (now - last_time),
        }
        if self.model.tokens is not None:
            rates["tokens_per_second"] = speed * self.model.tokens
        if self._peak is not None:
            rates["mfu"] = flops / self._peak
        return rates | {"memory_gib": memory(self.device) / GIB} | system(self.device)


def memory(device: torch.device) -> int:
    """Bytes: peak allocation of a GPU, or resident memory of the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def system(device: torch.device) -> dict[str, float]:
    """Load of the machine under MLflow's names of system metrics. Processor load is since the last call."""
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    load = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGA,
        "system_memory_usage_percentage": memory.percent,
        "network_receive_megabytes": network.bytes_recv / MEGA,
        "network_transmit_megabytes": network.bytes_sent / MEGA,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        load[f"gpu_{device.index}_memory_usage_megabytes"] = (total - free) / MEGA
        load[f"gpu_{device.index}_memory_usage_percentage"] = 100 * (1 - free / total)
    return {f"system/{name}": value for name, value in load.items()}


def matmul_speed(dtype: torch.dtype, device: torch.device, side: int | None = None) -> float:
    """FLOP a second of a matrix product, the fastest of a few: that of a large one stands for the device's peak.

    Args:
        dtype: of the matrices.
        device: where they are multiplied.
        side: of the matrices; None for large ones.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(PEAK_TRIES):
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * side**3 / fastest
