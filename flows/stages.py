"""The stages as Prefect flows: each one alone, resumable, and free when it is done.

Every flow returns the URL of its manifest. A stage that was done before ends in the state
``Skipped``.
"""

from functools import partial
from typing import Annotated

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from dit.encode import EncodeConfig
from dit.evaluate import EvaluateConfig
from dit.sample import SampleConfig
from dit.train import TrainConfig
from flows.contract import STAGES
from flows.launch.spec import LaunchSpec, LocalLaunch
from flows.perform import RunSettings, perform
from flows.registry.config import RegisterConfig
from flows.shard_tasks import spread
from storage.archives.open import ArchiveRef
from storage.shards import shard as tars
from storage.shards.shard import ShardConfig

ManifestRef = Annotated[str, Field(description="Manifest URL of the stage before, its folder, or its MLflow run id")]

HERE = RunSettings()


@flow(flow_run_name="shard")
def shard(archive: ArchiveRef, config: ShardConfig = ShardConfig(), settings: RunSettings = HERE) -> State[str]:
    """Images to webdataset tars."""
    return perform(STAGES["shard"], config, archive, settings, run=partial(tars.run, spread=spread(config.runner)))


@flow(flow_run_name="encode")
def encode(
    shards: ManifestRef, config: EncodeConfig, launcher: LaunchSpec = LocalLaunch(), settings: RunSettings = HERE
) -> State[str]:
    """Tars to a store of latents, on ranks that torchrun starts if there are several."""
    return perform(STAGES["encode"], config, shards, settings, launcher)


@flow(flow_run_name="train")
def train(
    latents: ManifestRef,
    config: TrainConfig = TrainConfig(),
    launcher: LaunchSpec = LocalLaunch(),
    settings: RunSettings = HERE,
) -> State[str]:
    """Latents to a checkpoint, on ranks that torchrun starts."""
    return perform(STAGES["train"], config, latents, settings, launcher)


@flow(flow_run_name="sample")
def sample(
    checkpoint: ManifestRef,
    config: SampleConfig = SampleConfig(),
    launcher: LaunchSpec = LocalLaunch(),
    settings: RunSettings = HERE,
) -> State[str]:
    """A checkpoint to images, on ranks that torchrun starts if there are several."""
    return perform(STAGES["sample"], config, checkpoint, settings, launcher)


@flow(flow_run_name="evaluate")
def evaluate(
    samples: ManifestRef, config: EvaluateConfig, launcher: LaunchSpec = LocalLaunch(), settings: RunSettings = HERE
) -> State[str]:
    """Images to metrics, on ranks that torchrun starts if there are several."""
    return perform(STAGES["evaluate"], config, samples, settings, launcher)


@flow(flow_run_name="register")
def register(
    metrics: ManifestRef, config: RegisterConfig = RegisterConfig(), settings: RunSettings = HERE
) -> State[str]:
    """A checkpoint to a version in the model registry."""
    return perform(STAGES["register"], config, metrics, settings)
