"""Memory and energy of what a rank works on."""

import pynvml
import torch

from storage.cost import Gauge
from storage.processors import Processors


class Gpu:
    """A `storage.cost.Gauge` of a rank with a GPU.

    Args:
        index: torch's number of the GPU.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        torch.cuda.reset_peak_memory_stats(index)
        properties = torch.cuda.get_device_properties(index)
        self.device, self.unread = properties.name, ""
        try:
            pynvml.nvmlInit()
            # By its UUID: NVML knows nothing of CUDA_VISIBLE_DEVICES, and numbers all GPUs of the machine.
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            self._before = self._millijoules()
        except pynvml.NVMLError as error:
            self.unread = f"NVML does not tell the energy of {properties.name} ({error})"

    def peak_memory(self) -> int:
        """Most bytes that torch had allocated."""
        return torch.cuda.max_memory_allocated(self._index)

    def joules(self) -> float:
        """Energy of the GPU."""
        return (self._millijoules() - self._before) / 1000

    def _millijoules(self) -> int:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def gauge(local_rank: int = 0) -> Gauge:
    """The gauge of a rank of this machine: of its GPU, or without one of the processors."""
    return Gpu(local_rank) if torch.cuda.is_available() else Processors(first=local_rank == 0)
