"""How much memory a process has had at its height."""

import resource
from pathlib import Path


def peak_mib() -> float:
    """Of this process, MiB. On Linux ``getrusage`` also counts what its parent had when it was started."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return (found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024
