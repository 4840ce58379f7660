"""The checks, in the order in which they run. A new check is a function and a row here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

from flows.launch.spec import LocalLaunch, NodesLaunch
from flows.launch.torchrun import JOIN_TIMEOUT_SECONDS
from storage.finding import Finding

LIMIT_SECONDS = 180.0
"""Ends a check that hangs. Each takes seconds, and the import of torch may take a minute on a cold disk."""


@dataclass(frozen=True)
class Asked:
    """What the checks are about."""

    root: str
    launch: LocalLaunch | NodesLaunch
    named: bool
    """Whether the checks that run were named one by one."""


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: its short name.
        what: what it looks at, in a few words.
        function: ``module:function``, which returns a `Finding`. It is imported when it runs.
        takes: the fields of `Asked` that it takes as arguments.
        limit: seconds after which it is ended.
    """

    name: str
    what: str
    function: str
    takes: Sequence[str] = ()
    limit: float = LIMIT_SECONDS

    def run(self, asked: Asked) -> Finding:
        """Run it in this process."""
        finding: Finding = resolve_name(self.function)(*(getattr(asked, name) for name in self.takes))
        return finding


CHECKS = (
    Check(
        "packages",
        "versions of the packages, against what ditflow needs and was tested with",
        "flows.doctor.packages:check",
    ),
    Check("machine", "cores, memory and shared memory", "storage.doctor:machine"),
    Check("root", "exclusive creation, replacement and room in the root", "storage.doctor:root", ("root",)),
    Check("cache", "room, speed and place of this machine's cache", "storage.doctor:cache_disk"),
    Check("clock", "this machine's clock against the root's", "storage.doctor:clock", ("root",)),
    Check("ports", "the ports of `ditflow up`, and this machine's name", "flows.doctor.servers:ports", ("root",)),
    Check("prefect", "version and answer of the Prefect server", "flows.doctor.servers:prefect", ("root",)),
    Check("mlflow", "version and answer of MLflow", "flows.doctor.servers:mlflow", ("root",)),
    Check("gpus", "the GPUs that torch sees", "dit.doctor.devices:gpus"),
    Check("driver", "version and faults that the driver of the GPUs reports", "dit.doctor.devices:driver"),
    Check("float32", "losses in float32, against kept ones", "dit.doctor.golden:check"),
    Check("bfloat16", "gradients in bfloat16, against float32", "dit.doctor.numerics:bfloat16"),
    Check("compile", "compiled blocks, against eager ones", "dit.doctor.numerics:compiled", ("named",), 1800.0),
    Check("attention", "the kernels of TMSA and DiT's attention", "dit.doctor.attention:check"),
    Check("speed", "each GPU's matrix products", "dit.doctor.speed:every_gpu"),
    Check("mfu", "a training step, as a share of the processor's speed", "dit.doctor.speed:mfu"),
    Check(
        "all-reduce",
        "the sum over all ranks, by which they share gradients",
        "flows.doctor.ranks:check",
        ("launch",),
        LIMIT_SECONDS + JOIN_TIMEOUT_SECONDS,
    ),
)
