"""The contract of a stage, as a table: what each one reads, writes and runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dit import encode, evaluate, sample, train
from dit.encode import EncodeConfig
from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.export import CheckpointManifest
from dit.metrics.extractors.load import load_extractor
from dit.sample import SampleConfig, SampleManifest
from dit.train import TrainConfig
from dit.vae import VaeRef, info
from flows.registry import config
from flows.registry.config import ModelManifest, RegisterConfig
from storage.archives.open import ArchiveRef
from storage.config import Config
from storage.latents import LatentManifest
from storage.manifest import Manifest, Provenance, StageOutput, json_digest, stage_output
from storage.shards import shard
from storage.shards.shard import ShardConfig, ShardManifest

Source = ArchiveRef | Manifest


@dataclass(frozen=True)
class Stage:
    """One arrow of the pipeline.

    Args:
        config: its config.
        version: raised when the same config and inputs make other bytes than before.
        kind: the manifest it writes; its ``STAGE`` is the stage's name.
        reads: the manifest it starts from; None for the stage that reads an archive.
        role: what it calls that input.
        inputs: digests of all else that decides its bytes, by name.
        run: does the work that is not done yet and commits the manifest.
        ranked: whether ``run`` knows how to share the work among the ranks of a launcher.
    """

    config: type[Config]
    version: int
    kind: type[Manifest]
    reads: type[Manifest] | None
    role: str
    inputs: Callable[[Any, Any], dict[str, str]]
    run: Callable[..., Manifest]
    ranked: bool = False

    @property
    def name(self) -> str:
        """The stage's name: its folder, its command, its flow."""
        return self.kind.STAGE

    def source(self, given: ArchiveRef | str) -> Source:
        """Read the manifest that the stage starts from.

        Raises:
            InputError: there is none, or it is another stage's.
        """
        if self.reads is None:
            assert isinstance(given, ArchiveRef)
            return given
        assert isinstance(given, str)
        return self.reads.read(given)

    def output(
        self, root: str, config: Config, source: Source, *, force: bool = False, provenance: Provenance | None = None
    ) -> StageOutput:
        """Name the folder that this work ends in, whether it is done or not."""
        parents = {self.role: source} if isinstance(source, Manifest) else {}
        inputs = self.inputs(config, source)
        return stage_output(
            root,
            self.name,
            self.version,
            config,
            parents=parents,
            inputs=inputs,
            force=force,
            provenance=provenance or Provenance(),
        )


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    name: str
    state: Literal["ran", "skipped"]
    seconds: float
    manifest: str
    """URL."""


def _vae_inputs(ref: VaeRef | None) -> dict[str, str]:
    return {"vae": json_digest(info(ref).identity())} if ref else {}


def _encode_inputs(config: EncodeConfig, _: ShardManifest) -> dict[str, str]:
    return _vae_inputs(config.vae)


def _sample_inputs(config: SampleConfig, checkpoint: CheckpointManifest) -> dict[str, str]:
    return _vae_inputs(config.vae or checkpoint.card.vae_ref)


def _evaluate_inputs(config: EvaluateConfig, _: SampleManifest) -> dict[str, str]:
    return {"extractor": load_extractor(config.extractor).sha256}


def _nothing_else(_: Config, __: Manifest) -> dict[str, str]:
    return {}


def _register(config: RegisterConfig, metrics: MetricsManifest, **run: Any) -> ModelManifest:
    from flows.registry import register  # MLflow takes seconds to import, and most processes register nothing

    return register.run(config, metrics, **run)


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            ShardConfig,
            shard.VERSION,
            ShardManifest,
            None,
            "archive",
            lambda _, archive: shard.input_digests(archive),
            shard.run,
        ),
        Stage(
            EncodeConfig,
            encode.VERSION,
            LatentManifest,
            ShardManifest,
            "shards",
            _encode_inputs,
            encode.run,
            ranked=True,
        ),
        Stage(
            TrainConfig,
            train.VERSION,
            CheckpointManifest,
            LatentManifest,
            "latents",
            _nothing_else,
            train.run,
            ranked=True,
        ),
        Stage(
            SampleConfig,
            sample.VERSION,
            SampleManifest,
            CheckpointManifest,
            "checkpoint",
            _sample_inputs,
            sample.run,
            ranked=True,
        ),
        Stage(
            EvaluateConfig,
            evaluate.VERSION,
            MetricsManifest,
            SampleManifest,
            "samples",
            _evaluate_inputs,
            evaluate.run,
            ranked=True,
        ),
        Stage(RegisterConfig, config.VERSION, ModelManifest, MetricsManifest, "metrics", _nothing_else, _register),
    )
}
