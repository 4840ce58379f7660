"""Start the ranks of a stage, wherever they run, and restart them when one is lost.

`run` hands the stage to Slurm or Kubernetes, or starts torchrun on this machine. It reads the output of the ranks
through a pipe, and `RankLog` sorts it into log lines, progress and errors. When a rank is killed, fails with an
unexpected error or receives SIGTERM, `run` starts a new torchrun, ``max_restarts`` times at most, and the stage
resumes from what it has committed. Any other error ends the stage.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from flows.children import child
from flows.launch import kubernetes, slurm, torchrun
from flows.launch.rank_log import Logger, LostRankError, Progress, RankLog
from flows.launch.spec import LAUNCHER, KubernetesLaunch, LaunchSpec, LocalLaunch, NodesLaunch, SlurmLaunch, WorkerSpec
from storage.errors import InputError, PreemptedError

SHUTDOWN_SECONDS = 15
"""How long torchrun waits for its ranks after SIGTERM; less than `children.GRACE_SECONDS`, which torchrun has."""
RESTART_DELAY_SECONDS = SHUTDOWN_SECONDS + 5
"""Before a restart on several nodes: by then every old torchrun has ended, and none joins the new rendezvous."""


def run(spec: WorkerSpec, launch: LaunchSpec, *, progress: Progress, log: Logger) -> None:
    """Run a stage on all ranks and wait for its end.

    When the caller is cancelled, the ranks end too. When it is killed, the ranks on this machine end, and a Slurm or
    Kubernetes job goes on. Restarts use a new torchrun, because torchrun's own restart can hang.

    Args:
        spec: the stage.
        launch: where its ranks run.
        progress: called with done, total and unit.
        log: receives the log lines of all ranks.

    Raises:
        InputError: a rank found the user's input wrong, or the cluster cannot be used.
        PreemptedError: the ranks received SIGTERM more than ``max_restarts`` times; their work is saved.
        WorkerError: a rank failed, and its traceback is in the log; or it was killed; or nodes are missing.
    """
    if isinstance(launch, SlurmLaunch):
        return slurm.run(spec, launch, progress=progress, log=log)
    if isinstance(launch, KubernetesLaunch):
        return kubernetes.run(spec, launch, progress=progress, log=log)
    for attempt in range(launch.max_restarts + 1):
        try:
            return _run_torchrun(spec, launch, RankLog(progress, log.info))
        except (LostRankError, PreemptedError) as error:
            if attempt == launch.max_restarts:
                raise
            log.warning(f"{error}; restarting all ranks ({attempt + 1} of {launch.max_restarts})")
            time.sleep(RESTART_DELAY_SECONDS if isinstance(launch, NodesLaunch) else 0)
    return None


def announced(launch: LaunchSpec) -> str:
    """What to say while the ranks start, which takes seconds or longer."""
    if isinstance(launch, LocalLaunch | NodesLaunch):
        ranks = f"{launch.world_size} rank{'s' * (launch.world_size > 1)}"
        return f"starting {ranks} under torchrun"
    return f"submitting a job to {launch.kind}"


def check(launch: LaunchSpec, root: str, *, force: bool = False) -> None:
    """Check that ranks can be started from this machine; nothing is started.

    Args:
        launch: where the ranks run.
        root: folder or URL of all outputs.
        force: whether finished stages run again.

    Raises:
        InputError: they cannot, or would start again for ever.
    """
    if isinstance(launch, SlurmLaunch):
        if force and not launch.wait:
            remedy = "set launch.wait to true, or change a value of the recipe"
            raise InputError(f"force: with launch.wait: false each look would begin anew; {remedy}")
        slurm.check(launch, root)
    if isinstance(launch, KubernetesLaunch):
        kubernetes.check()


def _run_torchrun(spec: WorkerSpec, launch: LocalLaunch | NodesLaunch, ranks: RankLog) -> None:
    with tempfile.TemporaryDirectory(prefix="ditflow-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(spec.model_dump_json(), "utf-8")
        run_module("flows.launch.worker", path, launch, spec.output.header.folder_name, ranks)


def run_module(module: str, path: Path, launch: LocalLaunch | NodesLaunch, run_id: str, ranks: RankLog) -> None:
    """Run a module on all ranks of this machine, once.

    Args:
        module: what each rank runs.
        path: its argument, in a folder of its own for torchrun's files.
        launch: how many ranks, and where.
        run_id: a name that no other work at this launch's address has.
        ranks: reads what they print.

    Raises:
        DitflowError: a rank failed; see `RankLog.failure`.
    """
    with child(_command(module, path, launch, run_id), env=_env(launch)) as process:
        assert process.stdout is not None
        ranks.read(process.stdout)
        code = process.wait()
    if code != 0:
        raise ranks.failure(code)


def _command(module: str, path: Path, launch: LocalLaunch | NodesLaunch, run_id: str) -> list[str]:
    if isinstance(launch, LocalLaunch):
        # By file: torchrun's own store would listen on all interfaces.
        file = path.with_name("rendezvous")
        options = ["--local-addr=127.0.0.1", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]
        options, nodes, nproc = [*options, f"--rdzv-endpoint={file}"], 1, launch.world_size
    else:
        options, nodes, nproc = torchrun.rendezvous(launch.address, run_id), launch.nodes, launch.nproc
    options.append(f"--log-dir={path.parent}")  # the default is a folder that nobody removes
    return torchrun.command(sys.executable, options, nodes, nproc, str(path), module)


def _env(launch: LocalLaunch | NodesLaunch) -> dict[str, str]:
    env = {LAUNCHER: str(os.getpid()), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), **torchrun.ENV}
    if isinstance(launch, LocalLaunch) and sys.platform == "linux":
        env |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # ranks of one machine talk on loopback alone
    return env
