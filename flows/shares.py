"""How processes divide a machine among them: GPUs and cores."""

import os
from itertools import takewhile

from storage.parallel import cores

GPUS = "CUDA_VISIBLE_DEVICES"


def shares(count: int, ranks: int = 1) -> list[dict[str, str]]:
    """What to set in the environment of each of so many processes that this machine runs at once.

    Each has GPUs of its own as long as there are as many; beyond that they share. Of several processes each has its
    part of the threads, which would otherwise be as many as there are cores. Ranks have one each, as torchrun has it.

    Args:
        count: number of processes.
        ranks: how many each of them starts.
    """
    visible = _gpus()
    threads = max(1, cores() // count) if ranks == 1 else 1
    env = {} if count == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    made = []
    for place in range(count):
        mine = visible[place::count] or visible[place % len(visible) : place % len(visible) + 1] if visible else []
        made.append(env | ({GPUS: ",".join(mine)} if mine else {}))
    return made


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: up to a name that is none, such as -1."""
    given = os.environ.get(GPUS)
    if given is not None:
        return list(takewhile(lambda name: name not in ("", "-1"), given.split(",")))
    import torch  # takes a second

    return [str(number) for number in range(torch.cuda.device_count())]
