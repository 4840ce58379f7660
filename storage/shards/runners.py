"""Where the units of a stage are worked on: here in threads or processes, or on a cluster.

Only what a recipe says; the flows know how.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from storage import uri
from storage.config import Config


class Threads(Config):
    """Threads of this process."""

    kind: Literal["threads"] = "threads"
    count: int = Field(0, ge=0)
    """How many; 0 means one for each core."""


class Processes(Config):
    """Processes on this machine."""

    kind: Literal["processes"] = "processes"
    count: int = Field(0, ge=0)
    """How many; 0 means one for each core."""


class Dask(Config):
    """A Dask cluster, whose workers have this package and see archive and root at the same URLs."""

    kind: Literal["dask"] = "dask"
    address: Annotated[str, AfterValidator(uri.without_credentials)] | None = None
    """Of the scheduler, such as ``tcp://10.0.0.1:8786``; without one, a cluster on this machine for the run."""


class Ray(Config):
    """A Ray cluster, whose workers have this package and see archive and root at the same URLs."""

    kind: Literal["ray"] = "ray"
    address: Annotated[str, AfterValidator(uri.without_credentials)] | None = None
    """Such as ``ray://10.0.0.1:10001``; without one, a cluster on this machine for the run."""


Runner = Annotated[Threads | Processes | Dask | Ray, Field(discriminator="kind")]


def here(runner: Runner) -> int:
    """How many workers of this machine it has; 0 means one for each core."""
    return runner.count if isinstance(runner, Threads | Processes) else 0
