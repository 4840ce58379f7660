"""The demo's pipeline, as small as it can be."""

import sys
from pathlib import Path

KEPT = {"train": 20, "held_out": 8}  # of each digit
STAGES = ("shard", "encode", "train", "sample", "evaluate", "register")
EVERYTHING = (*STAGES[:2], "encode held_out", *STAGES[2:])
ODD = "a b#c?d%20+é<b>&'\"[z]*{~::$HOME"
"""A name that has its own meaning in URLs, patterns, pages, shells and formats."""

SMALL = {
    "train.steps": 30,
    "train.batch_size": 16,
    "train.model.size": "{depth: 1, width: 32, heads: 2}",
    "train.checkpoint_every": 2,
    "train.log_every": 5,
    "train.held_out": "{every: 10, images: 40}",
    "sample.count": 40,
    "sample.steps": 4,
    "sample.block_rows": 10,
    "sample.batch_size": 10,
    "encode.block_rows": 64,
    "encode.chunk_rows": 32,
    "encode.batch_size": 32,
    "shard.images_per_shard": 50,
}


def arguments(name: str, root: Path | str, digits: Path | str, *more: str) -> list[str]:
    """Arguments of the command that make the demo small."""
    values = SMALL | {f"archive.{split}": f"{digits}/{split}" for split in ("train", "held_out")}
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return [name, "demo", "--root", str(root), "--json", *sets, *more]


def ditflow(*arguments: str) -> list[str]:
    """The command as a process of its own."""
    return [sys.executable, "-m", "flows.command.main", *arguments]
