"""Start a stage on its ranks, wherever those run, and bring back its log, its progress and its error."""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from flows.children import child
from flows.launch import kubernetes, slurm
from flows.launch.rank_log import LostRankError, Progress, RankLog
from flows.launch.spec import LAUNCHER, KubernetesLaunch, LaunchSpec, LocalLaunch, NodesLaunch, SlurmLaunch, WorkerSpec
from storage.errors import PreemptedError

SHUTDOWN_SECONDS = 15  # that torchrun gives its ranks, within what we give torchrun
SETTLING_SECONDS = SHUTDOWN_SECONDS + 5  # until all machines' torchruns have ended: a new one must not meet an old one
MEETING_SECONDS = 600  # that a machine waits for the others, at first and when they come again


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
        with child(_command(launch, path, spec.output.header.folder_name), env=_env()) as process:
            assert process.stdout is not None
            ranks.take(process.stdout)
            code = process.wait()
    if code != 0:
        raise ranks.failure(code)


def _command(launch: LocalLaunch | NodesLaunch, spec: Path, run_id: str) -> list[str]:
    if isinstance(launch, LocalLaunch):
        meeting, nproc = ["--standalone", "--nnodes=1", "--local-addr=127.0.0.1"], launch.world_size
    else:
        meeting = [f"--nnodes={launch.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={launch.address}"]
        meeting += [f"--rdzv-id={run_id}", f"--rdzv-conf=join_timeout={MEETING_SECONDS}"]
        nproc = launch.nproc
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={nproc}"]
    return [*torchrun, "-m", "flows.launch.worker", str(spec)]


def _env() -> dict[str, str]:
    return {
        LAUNCHER: str(os.getpid()),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        # A shared store can hang the ranks: https://github.com/pytorch/pytorch/issues/135712
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
