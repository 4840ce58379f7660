"""Configs of the workers that build shards: threads or processes of this machine, or a cluster.

`flows.shard_tasks` starts them.
"""

from typing import Annotated, Literal

from pydantic import Field

from storage.config import Config, Location


class Threads(Config):
    """Threads of this process."""

    kind: Literal["threads"] = "threads"
    count: int = Field(default=0, ge=0)
    """Number of threads; 0 means one for each core."""


class Processes(Config):
    """Processes on this machine."""

    kind: Literal["processes"] = "processes"
    count: int = Field(default=0, ge=0)
    """Number of processes; 0 means one for each core."""


class Dask(Config):
    """A Dask cluster. Its workers need this package, and the archive and the root under the same URLs."""

    kind: Literal["dask"] = "dask"
    address: Location | None = None
    """Address of the scheduler, such as ``tcp://10.0.0.1:8786``; null starts a cluster on this machine for the run."""


class Ray(Config):
    """A Ray cluster. Its workers need this package, and the archive and the root under the same URLs. Experimental: no
    cluster of several machines has run it yet.
    """

    kind: Literal["ray"] = "ray"
    """Which workers: those of a Ray cluster. Experimental: no cluster of several machines has run it yet."""
    address: Location | None = None
    """Address of the cluster, such as ``ray://10.0.0.1:10001``; null starts one on this machine for the run."""


Runner = Annotated[Threads | Processes | Dask | Ray, Field(discriminator="kind")]


def local_workers(runner: Runner) -> int:
    """Workers on this machine; 0 means one for each core."""
    return runner.count if isinstance(runner, Threads | Processes) else 0
