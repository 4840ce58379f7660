"""A real Slurm cluster on this machine: munged, slurmctld and two slurmd that are two nodes."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows import servers

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=10
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
MpiDefault=none
FirstJobId={first}
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
NodeName=n0 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[1]} CPUs=1
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[2]} CPUs=1
PartitionName=main Nodes=n0,n1 Default=YES State=UP PriorityTier=1
PartitionName=urgent Nodes=n0,n1 State=UP PriorityTier=2
"""


def reason_not_to() -> str | None:
    """Why there can be no cluster here, if so."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd must be root"


@contextmanager
def slurm_cluster(home: Path) -> Iterator[dict[str, str]]:
    """The environment with which Slurm's commands reach the cluster for the length of the block."""
    home.chmod(0o755)
    (home / "state").mkdir()
    (home / "munge.key").write_bytes(os.urandom(128))
    (home / "munge.key").chmod(0o400)
    ports = [servers.free_port() for _ in range(3)]
    # Ranks meet at a port that the job's number gives, and another test may have a cluster on this machine too.
    (home / "slurm.conf").write_text(CONF.format(home=home, ports=ports, first=os.getpid()))
    env = {"SLURM_CONF": str(home / "slurm.conf")}
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
    munged = ["munged", "--foreground", "--force", f"--seed-file={home / 'munged.seed'}"]
    munged += [f"--{option}={home / name}" for option, name in files.items()]
    with ExitStack() as running:
        for command in (munged, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", name] for name in ("n0", "n1"))):
            with (home / f"{command[0]}-{command[-1].rpartition('/')[2]}.out").open("wb") as out:
                process = subprocess.Popen(command, env=os.environ | env, stdout=out, stderr=out)
            running.callback(process.wait)
            running.callback(process.terminate)
            if command is munged:
                _wait_for(lambda: (home / "munge.socket").exists())
        _wait_for(lambda: _idle(env))
        yield env


def _idle(env: dict[str, str]) -> bool:
    said = subprocess.run(
        ["sinfo", "--noheader", "--partition=main", "--format=%T %D"],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.split() == ["idle", "2"]


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "the cluster does not come up"
        time.sleep(0.2)
