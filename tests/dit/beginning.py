"""Runs of training whose output is named after what they start from, too."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from dit import train
from dit.export import CheckpointManifest
from dit.training.config import TrainConfig
from storage.latents import LatentManifest
from storage.manifest import StageOutput, stage_output
from storage.tracker import NullTracker


def output(root: Path, config: TrainConfig, store: LatentManifest) -> StageOutput:
    stage = train.DEFINITION
    return stage_output(
        str(root),
        CheckpointManifest.STAGE,
        stage.version,
        config,
        parents={"latents": store} | stage.parents(config, store),
        inputs=stage.inputs(config, store),
    )


def run(root: Path, config: TrainConfig, store: LatentManifest, tracker: Any = None) -> CheckpointManifest:
    return train.run(config, store, out=output(root, config, store), tracker=tracker or NullTracker())


def weights(manifest: CheckpointManifest, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load(manifest.read_object(name))
