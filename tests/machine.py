"""A machine of another size."""

import os
from pathlib import Path

import pytest

from storage import parallel


def give_cores(patch: pytest.MonkeyPatch, count: int, share: Path = Path(os.devnull)) -> None:
    """Let this process see so many cores, and a container's share of them: that in a file, or none."""
    patch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)
    patch.setattr(parallel, "CPU_MAX", share)
