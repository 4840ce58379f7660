"""The stages at a size that a test can afford, and listeners of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from dit import encode, evaluate, sample, train
from dit.encode import EncodeConfig
from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.export import EMA_WEIGHTS, CheckpointManifest, ModelCard
from dit.export import MODEL as MODEL_CARD
from dit.models.choice import DiTChoice, Shape
from dit.sample import SampleManifest
from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from dit.vae import VaeRef
from storage import uri
from storage.header import Header
from storage.latents import LatentManifest
from storage.manifest import Manifest, StageOutput, stage_output
from storage.seal import opened, sealed
from storage.shards.shard import ShardManifest
from storage.tracker import NullTracker, Tracker

CLASSES = ("2", "5", "7")
SIDE, WIDTH = 32, 36
TRAIN, HELD_OUT = 14, 6  # of each class
COUNT = TRAIN * len(CLASSES)
SCALE, SHIFT = 0.7, 0.25

MODEL = DiTChoice(size=Shape(depth=1, width=32, heads=2))
TRAINING = TrainConfig(
    model=MODEL, steps=12, batch_size=8, learning_rate=1e-2, ema_decay=0.5, log_every=1, checkpoint_every=4
)
SAMPLING = SampleConfig(
    count=11, labels="balanced", steps=4, guidance_scale=9, guidance_channels="all", batch_size=3, block_rows=4
)


RATES = {"images_per_second", "tokens_per_second", "tflops", "data_wait_share", "memory_gib"}
"""Metrics of training that differ from run to run."""


class Recorder(NullTracker):
    """Remembers what it was told, but for the machine's load; rates are apart."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.artifacts: dict[str, bytes] = {}
        self.steps: list[tuple[int, int, str]] = []

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        values = {name: value for name, value in values.items() if not name.startswith("system/")}
        self.values[step] = {name: value for name, value in values.items() if name not in RATES}
        self.rates = {name: value for name, value in values.items() if name in RATES}

    def artifact(self, name: str, data: bytes) -> None:
        self.artifacts[name] = data

    def progress(self, done: int, total: int, unit: str) -> None:
        self.steps.append((done, total, unit))


class Killed(BaseException):
    """Ends a stage as a signal would: nothing catches it."""


class Killer(Recorder):
    """Kills the stage when it has done so much."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.when = when

    def progress(self, done: int, total: int, unit: str) -> None:
        super().progress(done, total, unit)
        if done >= self.when:
            raise Killed


def save_vae(folder: Path, *, channels: int = 4, halvings: int = 2, scale: float = SCALE, seed: int = 0) -> VaeRef:
    """A small autoencoder with random weights in diffusers' format."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(
            block_out_channels=(4, *[8] * halvings),
            down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
            up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
            norm_num_groups=2,
            latent_channels=channels,
            scaling_factor=scale,
            shift_factor=SHIFT,
        )
    model.save_pretrained(folder)
    return VaeRef(source=str(folder))


def encode_config(vae: VaeRef | None, **fields: Any) -> EncodeConfig:
    given = {"batch_size": 5, "threads": 2} | fields
    return EncodeConfig(vae=vae, resolution=SIDE, block_rows=16, chunk_rows=8, **given)


def output(root: Path | str, kind: type[Manifest], config: Any, **parents: Manifest) -> StageOutput:
    return stage_output(str(root), kind.STAGE, 1, config, parents=parents, inputs={})


def run_encode(
    root: Path | str, config: EncodeConfig, shards: ShardManifest, tracker: Tracker | None = None
) -> LatentManifest:
    out = output(root, LatentManifest, config, shards=shards)
    return encode.run(config, shards, out=out, tracker=tracker or NullTracker())


def run_train(
    root: Path | str, config: TrainConfig, latents: LatentManifest, tracker: Tracker | None = None
) -> CheckpointManifest:
    out = output(root, CheckpointManifest, config, latents=latents)
    return train.run(config, latents, out=out, tracker=tracker or NullTracker())


def through(root: Path | str, config: TrainConfig, latents: LatentManifest) -> tuple[Recorder, CheckpointManifest]:
    """A training, and what it told."""
    recorder = Recorder()
    return recorder, run_train(root, config, latents, recorder)


def run_sample(
    root: Path, config: SampleConfig, checkpoint: CheckpointManifest, tracker: Tracker | None = None
) -> SampleManifest:
    out = output(root, SampleManifest, config, checkpoint=checkpoint)
    return sample.run(config, checkpoint, out=out, tracker=tracker or NullTracker())


def run_evaluate(
    root: Path, config: EvaluateConfig, samples: SampleManifest, tracker: Tracker | None = None
) -> MetricsManifest:
    out = output(root, MetricsManifest, config, samples=samples)
    return evaluate.run(config, samples, out=out, tracker=tracker or NullTracker())


def objects(manifest: Manifest) -> dict[str, bytes]:
    """All committed bytes."""
    return {entry.path: uri.read(uri.join(manifest.uri, entry.path)) for entry in manifest.files}


def commit_model(folder: Path, card: ModelCard) -> None:
    """Make a trained model of a folder with its weights."""
    (folder / MODEL_CARD).write_text(card.model_dump_json())
    header = Header(stage="train", version=1, digest="0" * 64, config={}, inputs={}, parents={})
    out = StageOutput(uri=str(folder), header=header)
    out.commit(CheckpointManifest, [out.describe(name) for name in (MODEL_CARD, EMA_WEIGHTS)], card=card)


def reseal(folder: Path | str) -> None:
    """Change a manifest so that it agrees with the files that are there now."""
    path = Path(folder, "manifest.json")
    values = json.loads(opened(path.read_bytes()))
    there = [entry["path"] for entry in values["files"] if Path(folder, entry["path"]).exists()]
    data = {name: Path(folder, name).read_bytes() for name in there}
    values["files"] = [{"path": name, "size": len(data[name]), "sha256": uri.sha256(data[name])} for name in there]
    path.write_bytes(sealed(json.dumps(values).encode()))
