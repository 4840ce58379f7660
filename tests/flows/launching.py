"""A small training on random latents, for launches."""

import logging
from pathlib import Path

import numpy as np
from faults import dead_address

from dit.models.choice import DiTChoice, Shape
from dit.training.config import TrainConfig
from flows.contract import STAGES
from flows.launch.spec import WorkerSpec
from flows.tracking.spec import TrackingSpec
from storage.config import Config
from storage.latents import LatentManifest, VaeInfo, latent_layout
from storage.manifest import stage_output
from storage.rows.store import RowWriter

ROWS, SHAPE = 32, (4, 4, 4)
TINY = TrainConfig(
    model=DiTChoice(size=Shape(depth=1, width=16, heads=2)), steps=4, batch_size=8, flips=False, log_every=1
)
ENDLESS = TINY.model_copy(update={"steps": 1_000_000, "log_every": 50})
LOG = logging.getLogger("launch")


class Noted:
    """What a launch told."""

    def __init__(self) -> None:
        self.progress: list[tuple[int, int, str]] = []

    def __call__(self, done: int, total: int, unit: str) -> None:
        self.progress.append((done, total, unit))


def write_latents(root: Path) -> LatentManifest:
    """Random latents of three classes."""
    out = stage_output(str(root), LatentManifest.STAGE, 1, Config(), parents={}, inputs={})
    writer = RowWriter(out, latent_layout(ROWS, 1, SHAPE, block_rows=16, chunk_rows=8), {})
    rng = np.random.default_rng(0)
    for block in writer.missing():
        begin, end = writer.bounds(block)
        moments = {name: rng.random((end - begin, 1, *SHAPE)).astype(np.float16) for name in ("mean", "std")}
        keys = {"label": np.arange(begin, end, dtype=np.int32) % 3, "source_index": np.arange(begin, end)}
        writer.write(block, moments | keys)
    return out.commit(
        LatentManifest,
        writer.finish(),
        counts={"images": ROWS},
        resolution=8,
        split="train",
        flips=1,
        latent_shape=SHAPE,
        class_names=("a", "b", "c"),
        vae=VaeInfo(source="nowhere", sha256="0" * 64, downsample=2, channels=4, scaling_factor=1.0),
    )


def job(latents: LatentManifest, config: TrainConfig, tracking: TrackingSpec | None = None) -> WorkerSpec:
    output = STAGES["train"].output(latents.root, config, latents)
    tracking = tracking or TrackingSpec(uri=dead_address(), run_id=None)
    values = config.model_dump(mode="json")
    return WorkerSpec(stage="train", config=values, source=latents.uri, output=output, tracking=tracking)
