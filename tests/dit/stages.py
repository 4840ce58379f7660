"""Runs the first stages as often as it is asked to, each time in a process of its own that has all imports done.

Reads the folder of outputs from a line of stdin, and writes the process's number and how it ended.
"""

import os
import sys
from pathlib import Path

import tiny
import torch

from dit.vae import VaeRef
from storage.archives.open import ArchiveRef
from storage.code_version import code_version
from storage.latents import LatentManifest
from storage.manifest import stage_output
from storage.shards import shard
from storage.shards.runners import Threads
from storage.shards.shard import ShardConfig, ShardManifest
from storage.tracker import NullTracker

SHARDING = ShardConfig(images_per_shard=2, runner=Threads(count=2))


def run(pictures: Path, vae: VaeRef, root: Path) -> None:
    """Shard and encode what is not done yet."""
    archive = ArchiveRef(train=str(pictures / "train"), held_out=str(pictures / "held_out"))
    inputs = shard.input_digests(archive)
    out = stage_output(str(root), shard.STAGE, shard.VERSION, SHARDING, parents={}, inputs=inputs)
    made = out.committed(ShardManifest) or shard.run(SHARDING, archive, out=out, tracker=NullTracker())
    config = tiny.encode_config(vae)
    if tiny.output(root, LatentManifest, config, shards=made).committed(LatentManifest) is None:
        tiny.run_encode(root, config, made)


def main(pictures: str, vae: str) -> None:
    """Serve until stdin ends."""
    torch.set_num_threads(1)
    code_version()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(Path(pictures), VaeRef(source=vae), Path(line.strip()))
            os._exit(0)
        say(pid)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
