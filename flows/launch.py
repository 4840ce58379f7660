"""Start a stage on its ranks, wherever those run, and bring back its log, its progress and its error."""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from flows import kubernetes, slurm
from flows.kubernetes import KubernetesLaunch
from flows.process import child
from flows.rank_log import LostRankError, Progress, RankLog, WorkerError
from flows.slurm import SlurmLaunch
from flows.worker import LAUNCHER, WorkerSpec
from storage.config import Config
from storage.errors import PreemptedError

__all__ = ["KubernetesLaunch", "LaunchSpec", "LocalLaunch", "NodesLaunch", "SlurmLaunch", "WorkerError", "run"]

SHUTDOWN_SECONDS = 15  # that torchrun gives its ranks, within what we give torchrun
SETTLING_SECONDS = SHUTDOWN_SECONDS + 5  # until all machines' torchruns have ended: a new one must not meet an old one
MEETING_SECONDS = 600  # that a machine waits for the others, at first and when they come again


class LocalLaunch(Config):
    """Ranks on this machine, under one torchrun."""

    kind: Literal["local"] = "local"
    """Where ranks run."""
    nproc: int = Field(1, ge=0)
    """Ranks to start: one a GPU, or on CPU any number; 0 means one for each GPU of this machine."""
    max_restarts: int = Field(3, ge=0)
    """How often all ranks start again, from their last checkpoint, when one is lost or told to stop."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nproc or max(1, torch.cuda.device_count())


class NodesLaunch(Config):
    """Ranks on several machines that see the same files; the same command is given on each of them."""

    kind: Literal["nodes"]
    """Where ranks run."""
    nodes: int = Field(2, ge=1)
    """Machines. None begins before all have come, for which they have ten minutes, at first and after a loss."""
    nproc: int = Field(1, ge=1)
    """Ranks on each machine."""
    address: str = Field(pattern=r"^[^\s:/]+:\d{1,5}$")
    """``host:port`` of the first machine, where the others find each other."""
    max_restarts: int = Field(3, ge=0)
    """How often the ranks of this machine start again, from their last checkpoint, when one is lost or told to stop
    anywhere."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.nproc


def _local_by_default(value: Any) -> Any:
    return {"kind": "local"} | value if isinstance(value, dict) else value


LaunchSpec = Annotated[
    Annotated[LocalLaunch | NodesLaunch | SlurmLaunch | KubernetesLaunch, Field(discriminator="kind")],
    BeforeValidator(_local_by_default),
]
"""Any way to start ranks, told apart by ``kind``; without one it is ``local``."""


def run(
    spec: WorkerSpec,
    launch: LaunchSpec,
    *,
    progress: Progress,
    log: "logging.Logger | logging.LoggerAdapter[logging.Logger]",
) -> None:
    """Run a stage on all ranks and wait for them.

    Lines of all ranks go to ``log``. When the caller is cancelled, the ranks end too. When it is killed,
    those on this machine end, and a cluster's go on. When a rank is lost, or told to stop, all start again: a
    whole new torchrun, since a torchrun that restarts can hang.

    Raises:
        InputError: a rank found the user's input wrong, or the cluster cannot be used.
        PreemptedError: the ranks were told to stop too often; they have saved.
        WorkerError: a rank failed or was killed; if it failed, its traceback is in the log. Or machines did not come.
    """
    if isinstance(launch, SlurmLaunch):
        return slurm.run(spec, launch, progress=progress, log=log)
    if isinstance(launch, KubernetesLaunch):
        return kubernetes.run(spec, launch, progress=progress, log=log)
    for attempt in range(launch.max_restarts + 1):
        try:
            return _torchrun(spec, launch, RankLog(progress, log.info))
        except (LostRankError, PreemptedError) as error:
            if attempt == launch.max_restarts:
                raise
            log.warning(f"{error}; starting all ranks again, {attempt + 1} of {launch.max_restarts} times")
            time.sleep(SETTLING_SECONDS if isinstance(launch, NodesLaunch) else 0)
    return None


def _torchrun(spec: WorkerSpec, launch: LocalLaunch | NodesLaunch, ranks: RankLog) -> None:
    with tempfile.TemporaryDirectory(prefix="ditflow-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(spec.model_dump_json())
        with child(_command(launch, path, spec.output.header.digest), env=_env()) as process:
            assert process.stdout is not None
            ranks.take(process.stdout)
            code = process.wait()
    if code != 0:
        raise ranks.failure(code)


def _command(launch: LocalLaunch | NodesLaunch, spec: Path, digest: str) -> list[str]:
    if isinstance(launch, LocalLaunch):
        meeting, nproc = ["--standalone", "--nnodes=1", "--local-addr=127.0.0.1"], launch.world_size
    else:
        meeting = [f"--nnodes={launch.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={launch.address}"]
        meeting += [f"--rdzv-id={digest[:16]}", f"--rdzv-conf=join_timeout={MEETING_SECONDS}"]
        nproc = launch.nproc
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={nproc}"]
    return [*torchrun, "-m", "flows.worker", str(spec)]


def _env() -> dict[str, str]:
    return {
        LAUNCHER: str(os.getpid()),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        # A shared store can hang the ranks: https://github.com/pytorch/pytorch/issues/135712
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
