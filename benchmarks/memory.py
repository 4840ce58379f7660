"""Peak memory of a process."""

import resource
from pathlib import Path


def peak_mib() -> float:
    """Peak resident memory of this process in MiB; ``getrusage`` would include its parent's at the fork on Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return (found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024
