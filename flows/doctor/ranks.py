"""The sum over all ranks, under torchrun: the check, and, as a module, one rank of it."""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from flows.launch.rank_log import RankLog
from flows.launch.spec import LocalLaunch, NodesLaunch
from flows.launch.start import run_module
from flows.launch.worker import end_with_launcher, report_error
from storage.errors import DitflowError
from storage.finding import Finding, failed

RUN_ID = "ditflow-doctor"
REMEDY = "look for the reason with NCCL_DEBUG=INFO, and name the network with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"


def check(launch: LocalLaunch | NodesLaunch) -> Finding:
    """Sum over the ranks of a launch. On a CPU one rank becomes two, so that something is summed."""
    import torch

    from dit.doctor.all_reduce import Sum, judged

    launch, gpus = _at_least_two(launch), torch.cuda.device_count()
    if gpus and launch.nproc > gpus:
        return failed(f"{launch.nproc} ranks on a machine with {gpus} GPUs", "set launch.nproc to the number of GPUs")
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ditflow-") as folder:
        path = Path(folder) / "sum.json"
        try:
            run_module(__name__, path, launch, RUN_ID, RankLog(lambda *_: None, said.append))
        except DitflowError as error:
            sys.stdout.writelines(f"{line}\n" for line in said)
            return failed(str(error), REMEDY)
        return judged(Sum(**json.loads(path.read_text())))


def _at_least_two(launch: LocalLaunch | NodesLaunch) -> LocalLaunch | NodesLaunch:
    import torch

    if isinstance(launch, LocalLaunch) and launch.world_size == 1 and not torch.cuda.is_available():
        return LocalLaunch(nproc=2)
    return launch


def main(path: str) -> int:
    """One rank. The first one of each machine writes what it has measured."""
    rank = int(os.environ["RANK"])
    end_with_launcher()
    try:
        from dit.doctor.all_reduce import measure

        found = measure()
        if os.environ["LOCAL_RANK"] == "0":
            Path(path).write_text(json.dumps(asdict(found)))
    except Exception as error:
        report_error(error, rank)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
