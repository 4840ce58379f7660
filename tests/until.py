"""Waits for events."""

import time
from collections.abc import Callable

LIMIT = 500
"""Seconds after which a test has failed; no test that passes comes near."""


def until(holds: Callable[[], object], pause: float = 0.02) -> None:
    """Wait until something holds, which is asked again after each pause, in seconds: longer ones spare a server."""
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(pause)
