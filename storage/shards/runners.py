"""Configs of the workers that build shards: threads or processes of this machine, or a cluster.

`flows.shard_tasks` starts them.
"""

from typing import Annotated, Literal

from pydantic import Field

from storage.config import Config, Location


class Local(Config):
    """Threads of this process, or processes, on this machine."""

    kind: Literal["threads", "processes"] = "threads"
    count: int = Field(default=0, ge=0)
    """Number of them; 0 means one for each core."""


class Cluster(Config):
    """A cluster of Dask or Ray. Its workers need this package, and the archive and the root under the same URLs."""

    kind: Literal["dask", "ray"] = "dask"
    """Which cluster. That of Ray is experimental: none of several machines has run it yet."""
    address: Location | None = None
    """Address of the scheduler, such as ``tcp://10.0.0.1:8786`` or ``ray://10.0.0.1:10001``; null starts a cluster on
    this machine for the run.
    """


Runner = Annotated[Local | Cluster, Field(discriminator="kind")]


def local_workers(runner: Runner) -> int:
    """Workers on this machine; 0 means one for each core."""
    return runner.count if isinstance(runner, Local) else 0
