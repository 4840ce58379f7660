"""The config of a launch (`LaunchSpec`: where the ranks of a stage run), and the job of a rank (`WorkerSpec`)."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, field_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from flows.tracking.spec import TrackingSpec
from storage.config import Config
from storage.manifest import StageOutput

LAUNCHER = "DITFLOW_LAUNCHER"
"""The environment variable that holds the pid of the process that started torchrun."""


class LocalLaunch(Config):
    """Ranks on this machine, under one torchrun."""

    kind: Literal["local"] = "local"
    """Where the ranks run: on this machine."""
    nproc: int = Field(default=1, ge=0)
    """Number of ranks: one for each GPU, or any number on a CPU. 0: one for each GPU of this machine."""
    max_restarts: int = Field(default=3, ge=0)
    """How many times all ranks are restarted from the last checkpoint after one was lost or received SIGTERM."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        import torch  # a rank imports it after its signals and log are set up

        return self.nproc or max(1, torch.cuda.device_count())


class NodesLaunch(Config):
    """Ranks on several nodes that see the same files. Run the same command on every node."""

    kind: Literal["nodes"]
    """Where the ranks run: on several nodes."""
    nodes: int = Field(default=2, ge=1)
    """Number of nodes. Work starts when all have joined; each waits 600 s for the others, also after a restart."""
    nproc: int = Field(default=1, ge=1)
    """Ranks on each node: one for each GPU, or any number on a CPU."""
    address: str = Field(pattern=r"^[^\s:/]+:\d{1,5}$")
    """host:port of the first node, where the nodes find each other (torchrun's rendezvous endpoint)."""
    max_restarts: int = Field(default=3, ge=0)
    """How many times this node restarts its ranks from the last checkpoint after any rank was lost or received
    SIGTERM."""

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.nproc


class SlurmLaunch(Config):
    """Ranks on nodes of a Slurm cluster, which have this Python and these files at the same paths."""

    kind: Literal["slurm"]
    """Where the ranks run: on a Slurm cluster."""
    nodes: int = Field(default=1, ge=1)
    """Number of nodes of the job."""
    nproc: int = Field(default=1, ge=1)
    """Ranks on each node: one for each GPU, or any number on a CPU."""
    options: dict[str, str | int] = Field(default_factory=dict)
    """More options of sbatch by their long names, such as partition, time, gpus-per-node."""
    setup: tuple[str, ...] = ()
    """Shell commands to run before the ranks start, such as: module load cuda."""
    folder: str | None = None
    """Folder for the job's script and log, which all nodes see. Default: below the output, if that is a local path."""
    max_restarts: int = Field(default=10, ge=0)
    """How many times a new job is submitted after one reached its time limit, was preempted, or lost a rank or node."""
    poll_seconds: float = Field(default=5.0, gt=0)
    """Seconds between two queries of the job's state and log."""
    wait: bool = True
    """Whether the flow follows the job to its end. Otherwise it submits the job and ends, and the same command or flow,
    started again, looks how far the job is and goes on when it has ended."""

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.nproc

    @field_validator("options")
    @classmethod
    def _one_line_each(cls, options: dict[str, str | int]) -> dict[str, str | int]:
        for key, value in options.items():
            if not key.replace("-", "").isalnum() or "\n" in str(value):
                raise ValueError(f"{key}: must be the long name of an sbatch option, with a value of one line")
        return options


class KubernetesLaunch(Config):
    """Ranks in pods of a Kubernetes cluster, where the root is an object store or a mounted volume. Experimental: no
    cluster has run it yet.
    """

    kind: Literal["kubernetes"]
    """Where the ranks run: on a Kubernetes cluster. Experimental: no cluster has run it yet."""
    image: str = Field(pattern=r"^\S+$")
    """Container image in which ditflow is installed, such as that of docs/deploy/Containerfile."""
    nodes: int = Field(default=1, ge=1)
    """Number of pods."""
    nproc: int = Field(default=1, ge=1)
    """Ranks in each pod: one for each GPU."""
    gpus: bool = True
    """Whether each pod requests as many GPUs as it has ranks."""
    namespace: str = "default"
    """Kubernetes namespace of the job."""
    secret: str | None = None
    """Name of a Secret whose entries become environment variables of the pods, such as the credentials of the object
    store. Default: none."""
    volumes: dict[str, str] = Field(default_factory=dict)
    """Paths at which the pods mount persistent volumes, by the name of the volume claim."""
    max_restarts: int = Field(default=10, ge=0)
    """Pod restarts before the job fails: this number times the number of pods."""
    poll_seconds: float = Field(default=5.0, gt=0)
    """Seconds between two queries of the job's state."""

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.nproc


class AsRecipe(Config):
    """As the recipe's own launch says."""

    kind: Literal["recipe"] = "recipe"
    """Where the ranks run: where the recipe says."""


def _local_by_default(value: Any) -> Any:
    return {"kind": "local"} | value if isinstance(value, dict) else value


class _Tabs:
    """Both of Prefect's user interfaces show ``anyOf`` as tabs, and the older one does not know ``oneOf``."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        made = handler(core_schema)
        return made | {"anyOf": made.pop("oneOf")}


LaunchSpec = Annotated[
    Annotated[LocalLaunch | NodesLaunch | SlurmLaunch | KubernetesLaunch, Field(discriminator="kind")],
    BeforeValidator(_local_by_default),
    _Tabs(),
]
"""Where the ranks of a stage run, as ``kind`` says; ``local`` without one."""
LaunchChoice = Annotated[
    Annotated[AsRecipe | LocalLaunch | NodesLaunch | SlurmLaunch | KubernetesLaunch, Field(discriminator="kind")],
    BeforeValidator(_local_by_default),
    _Tabs(),
]
"""The same in the form of a recipe."""


class WorkerSpec(Config):
    """Everything that a rank needs to run one stage; the launcher passes it as a JSON file."""

    stage: str
    """Name of the stage, such as train."""
    config: dict[str, Any]
    """The stage's config, as JSON values."""
    source: str
    """URL of the manifest that the stage reads."""
    output: StageOutput
    """The folder that the stage writes."""
    tracking: TrackingSpec
    """The MLflow run that rank 0 writes."""
    patience: float = 0.0
    """Seconds to wait for a store that does not answer."""

    @property
    def job_name(self) -> str:
        """Name of the Slurm or Kubernetes job; that of the output, so that a later launch finds a running job."""
        return f"ditflow-{self.output.name}"
