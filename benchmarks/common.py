"""The output of every benchmark: results, ratios, and the machine."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from storage.parallel import cores


@dataclass(frozen=True)
class Result:
    """One measured number."""

    name: str
    value: float
    unit: str


Measured = tuple[list[Result], dict[str, float]]
"""Results, and ratios by name."""


def main(measure: Callable[..., Measured], description: str, **paths: str) -> None:
    """Measure, and print one JSON object or a table.

    Args:
        measure: takes the path of each option that is given, by name.
        description: what is measured.
        paths: the options that are paths, with their help.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for name, text in paths.items():
        parser.add_argument(f"--{name}", type=Path, help=text)
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    results, ratios = measure(**{name: path for name, path in options.items() if path is not None})
    if as_json:
        print(json.dumps({"machine": machine(), "results": [asdict(result) for result in results], "ratios": ratios}))
        return
    for result in results:
        print(f"{result.name:<32} {result.value:12.3f} {result.unit}")
    for name, ratio in ratios.items():
        print(f"{name:<32} {ratio:12.3f} x")


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of a call, including the GPU work that it starts."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def fastest(work: Callable[[], object], times: int = 20) -> float:
    """Seconds of the fastest of ``times`` runs after a warm-up: other work on the machine only adds time."""
    work()
    return min(seconds(work) for _ in range(times))


def machine() -> dict[str, str | int | float]:
    """The machine and the versions that the results belong to."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
