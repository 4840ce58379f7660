"""The GPUs of this machine and their driver."""

import shutil
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import torch

from dit.devices import device
from storage.finding import Finding, failed, ok, skipped, warning

GIB = 2**30
BUSY = 2 * GIB
"""Memory of a GPU that is in use before we use it: more is another process."""
BF16_CAPABILITY = (8, 0)
"""The first compute capability whose units compute in bfloat16."""
DRIVER = Path("/proc/driver/nvidia/version")
ASK_SECONDS = 60
HEALTH = (
    "driver_version",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.active",
)
"""What nvidia-smi is asked."""
BAD_CLOCKS = {0x08: "a hardware limit", 0x20: "heat", 0x40: "heat", 0x80: "the power brake"}
"""Bits of NVML's reasons for slow clocks that tell of a fault; the others are idleness and the limits of power."""


def described() -> str:
    """The device that checks run on, in words."""
    where = device()
    return torch.cuda.get_device_name(where) if where.type == "cuda" else "the CPU"


def gpus() -> Finding:
    """The GPUs that torch sees, with their memory."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    build = f"torch {torch.__version__}"
    if not there:
        reason = " ".join(str(said[0].message).split())[:300] if said else "it sees none"
        if torch.version.cuda is None and not _has_driver():
            return skipped(f"no GPU; {build}")
        if torch.version.cuda is None:
            remedy = "install torch for CUDA: https://pytorch.org/get-started/locally"
            return failed(f"there is a driver for GPUs, but {build} is built without CUDA", remedy)
        if not _has_driver():
            return skipped(f"no GPU: no driver; {build} for CUDA {torch.version.cuda}")
        remedy = "see that nvidia-smi lists GPUs, that CUDA_VISIBLE_DEVICES names some, and that the driver is as new"
        return failed(f"{build} for CUDA {torch.version.cuda} uses no GPU: {reason}", remedy)
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in found).items())
    seen = (
        f"{names}, {min(gpu.total_memory for gpu in found) / GIB:.0f} GiB each; {build} for CUDA {torch.version.cuda}"
    )
    old = [f"{index}" for index, gpu in enumerate(found) if (gpu.major, gpu.minor) < BF16_CAPABILITY]
    if old:
        remedy = "set train.precision=float32 there: bfloat16 is emulated"
        return warning(f"{seen}; GPU {', '.join(old)} has no units for bfloat16", remedy)
    used = [total - free for free, total in map(torch.cuda.mem_get_info, range(len(found)))]
    busy = [f"{size / GIB:.0f} GiB of GPU {index}" for index, size in enumerate(used) if size > BUSY]
    if busy:
        return warning(f"{seen}; in use already: {', '.join(busy)}", "end the other processes that nvidia-smi lists")
    return ok(seen)


def driver() -> Finding:
    """The driver's version, and whether it reports faults of the GPUs."""
    if not _has_driver():
        return skipped("no GPU")
    if not shutil.which("nvidia-smi"):
        version = DRIVER.read_text().partition("\n")[0] if DRIVER.exists() else "its version is unknown"
        return ok(f"no nvidia-smi here; {version}")
    answers = [_asked(field) for field in HEALTH]  # one at a time: a driver that knows no such field refuses all
    if answers[0].returncode:
        seen = " ".join((answers[0].stdout + answers[0].stderr).split())[:300]
        return failed(f"nvidia-smi fails: {seen}", "restart the machine, or have its driver installed again")
    return health(*(done.stdout.splitlines() if done.returncode == 0 else [] for done in answers))


def health(versions: list[str], degrees: list[str], errors: list[str], clocks: list[str]) -> Finding:
    """What nvidia-smi's answers mean: one line for each GPU; no line if the driver does not know."""
    seen = f"driver {versions[0].strip()}" if versions else "no driver"
    warm = [int(line) for line in degrees if line.strip().isdecimal()]
    seen += f", {max(warm)} degrees at most" if warm else ""
    broken = [f"{index}" for index, line in enumerate(errors) if line.strip().isdecimal() and int(line)]
    if broken:
        remedy = "reset the GPU or take another one: memory errors stop or falsify a training"
        return failed(f"{seen}; GPU {', '.join(broken)} counts memory errors that ECC did not correct", remedy)
    slow = [f"GPU {index} by {', '.join(why)}" for index, line in enumerate(clocks) if (why := _throttled(line))]
    if slow:
        return warning(
            f"{seen}; clocks are held back: {'; '.join(slow)}", "see to cooling and power: nvidia-smi -q -d PERFORMANCE"
        )
    return ok(seen)


def _asked(field: str) -> "subprocess.CompletedProcess[str]":
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_SECONDS)


def _throttled(line: str) -> list[str]:
    try:
        bits = int(line.strip(), 16)
    except ValueError:
        return []
    return list(dict.fromkeys(reason for bit, reason in BAD_CLOCKS.items() if bits & bit))


def _has_driver() -> bool:
    return DRIVER.exists() or Path("/dev/nvidiactl").exists() or bool(shutil.which("nvidia-smi"))
