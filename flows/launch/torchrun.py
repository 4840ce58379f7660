"""The torchrun command of one node, the same for every kind of launch."""

from collections.abc import Iterable

ENV = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # it can hang the ranks: https://github.com/pytorch/pytorch/issues/135712
    "PYTHONSAFEPATH": "1",  # ranks import our packages, and not folders of the same names in the working directory
}
JOIN_TIMEOUT_SECONDS = 600
"""How long a node waits for the others, at the start and after each restart."""


def rendezvous(endpoint: str, job: str) -> list[str]:
    """The options by which the nodes of a job find each other.

    Args:
        endpoint: ``host:port`` of the first node.
        job: a name that no other job at this endpoint has.
    """
    timeout = f"--rdzv-conf=join_timeout={JOIN_TIMEOUT_SECONDS}"
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job}", timeout]


def command(
    python: str, options: Iterable[str], nodes: int | str, nproc: int, spec: str, module: str = "flows.launch.worker"
) -> list[str]:
    """The command that runs a stage, or another module, on ``nproc`` ranks of one of ``nodes`` nodes.

    Args:
        python: the interpreter.
        options: further options of torchrun.
        nodes: their number, or a shell expression that gives it.
        nproc: ranks on each node.
        spec: path of the `WorkerSpec` file, or what the module takes.
        module: what each rank runs.
    """
    size = [f"--nnodes={nodes}", f"--nproc-per-node={nproc}"]
    return [python, "-m", "torch.distributed.run", *size, *options, "-m", module, spec]
