"""Where the ranks of a stage run, and what each of them is told."""

from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator

from flows.tracking.spec import TrackingSpec
from storage.config import Config
from storage.manifest import StageOutput

LAUNCHER = "DITFLOW_LAUNCHER"
"""Names the environment variable with the pid of the process that started torchrun."""


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


class SlurmLaunch(Config):
    """Ranks on the nodes of a Slurm cluster, which runs this same Python and sees the same files."""

    kind: Literal["slurm"]
    """Where ranks run."""
    nodes: int = Field(1, ge=1)
    """Nodes of the job."""
    nproc: int = Field(1, ge=1)
    """Ranks on each node: one a GPU, or on CPU any number."""
    options: dict[str, str | int] = Field(default_factory=dict)
    """Further options of sbatch by their long names, such as partition, time, gpus-per-node."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the ranks start, such as ``module load cuda``."""
    folder: str | None = None
    """Where script and log go, a folder that all nodes see; by default the output's own, if it is a local path."""
    max_restarts: int = Field(10, ge=0)
    """How often a job that ran out of time, was preempted, or lost a rank or a node is followed by another."""
    poll_seconds: float = Field(5.0, gt=0)
    """Time between two looks at the job."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.nproc

    @field_validator("options")
    @classmethod
    def _one_line_each(cls, options: dict[str, str | int]) -> dict[str, str | int]:
        for key, value in options.items():
            if not key.replace("-", "").isalnum() or "\n" in str(value):
                raise ValueError(f"{key}: not an option of sbatch by its long name, with a value of one line")
        return options


class KubernetesLaunch(Config):
    """Ranks in pods of a Kubernetes cluster, which sees the root as an object store or a mounted volume."""

    kind: Literal["kubernetes"]
    """Where ranks run."""
    image: str = Field(pattern=r"^\S+$")
    """The container image, in which ditflow is installed."""
    nodes: int = Field(1, ge=1)
    """Pods, each on a node."""
    nproc: int = Field(1, ge=1)
    """Ranks in each pod, one a GPU."""
    gpus: bool = True
    """Ask for as many GPUs a pod as it has ranks."""
    namespace: str = "default"
    """Where the job lives."""
    secret: str | None = None
    """A Secret whose entries become the pods' environment: credentials of the object store."""
    volumes: dict[str, str] = Field(default_factory=dict)
    """Persistent volume claims and the paths at which the pods see them."""
    max_restarts: int = Field(10, ge=0)
    """How often all pods may be started again."""
    poll_seconds: float = Field(5.0, gt=0)
    """Time between two looks at the job."""

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


class WorkerSpec(Config):
    """Everything a rank needs to run one stage."""

    stage: str
    config: dict[str, Any]
    source: str
    """URL of the manifest that the stage starts from."""
    output: StageOutput
    tracking: TrackingSpec
