"""Waits for events."""

import time
from collections.abc import Callable

LIMIT = 500
"""Seconds after which a test has failed; no test that passes comes near."""


def until(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.02)
