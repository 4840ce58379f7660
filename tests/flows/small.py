"""A pipeline that a test can afford: digits of 16 px, a transformer of one block, every stage in this process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.encode import EncodeConfig
from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.metrics.extractors.load import ExtractorRef
from dit.models.choice import DiTChoice, Shape
from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from flows.contract import STAGES, Source
from flows.demo import CLASSIFIER
from flows.demo.digits import write_digits
from flows.registry.config import ModelManifest, RegisterConfig
from flows.tracking import runs
from flows.tracking.sink import MlflowSink, StageTracker
from storage.archives.open import ArchiveRef
from storage.config import Config
from storage.manifest import Manifest
from storage.shards.shard import ShardConfig
from storage.tracker import NullTracker

SHAPE = Shape(depth=1, width=32, heads=2)
KEPT = {"train": 6, "held_out": 2}  # of each digit

SAMPLING = SampleConfig(
    count=30, labels="balanced", sampler="ddim", steps=2, guidance_scale=2, guidance_channels="all", batch_size=30
)


def few_digits(folder: Path, kept: dict[str, int]) -> Path:
    """Scanned digits, so many of each."""
    write_digits(folder)
    for split, count in kept.items():
        for label in (folder / split).iterdir():
            for image in sorted(label.iterdir())[count:]:
                image.unlink()
    return folder


@dataclass(frozen=True)
class Small:
    """A root in which stages are brought to their manifests, tracked by MLflow or not and without Prefect's runs."""

    root: Path
    tracked: bool = True

    def bring(self, stage: str, config: Config, source: Source) -> Manifest:
        """What `flows.perform.perform` does."""
        output = STAGES[stage].output(str(self.root), config, source)
        if not self.tracked:
            return STAGES[stage].run(config, source, out=output, tracker=NullTracker())
        with runs.stage_run(output, str(self.root)) as (tracked, spec):
            tracker = StageTracker(MlflowSink(spec.uri, spec.run_id, spec.skip_to), None)
            manifest = STAGES[stage].run(config, source, out=tracked, tracker=tracker)
            tracker.close(tracked)
        return manifest

    def latents(self) -> Manifest:
        digits = few_digits(self.root / "digits", KEPT)
        archive = ArchiveRef(train=str(digits / "train"), held_out=str(digits / "held_out"))
        shards = self.bring("shard", ShardConfig(images_per_shard=50), archive)
        return self.bring("encode", EncodeConfig(vae=None, resolution=16, flips=False), shards)

    def checkpoint(self, latents: Manifest, steps: int = 2, shape: Shape = SHAPE, **fields: Any) -> Manifest:
        given = {"model": DiTChoice(size=shape, patch_size=4), "learning_rate": 0.01, "ema_decay": 0.5} | fields
        config = TrainConfig(steps=steps, batch_size=8, **given)
        return self.bring("train", config, latents)

    def evaluated(self, checkpoint: Manifest, sampling: SampleConfig = SAMPLING) -> MetricsManifest:
        samples = self.bring("sample", sampling, checkpoint)
        config = EvaluateConfig(extractor=ExtractorRef(weights=str(CLASSIFIER)), batch_size=64)
        metrics = self.bring("evaluate", config, samples)
        assert isinstance(metrics, MetricsManifest)
        return metrics

    def registered(self, metrics: MetricsManifest, config: RegisterConfig) -> ModelManifest:
        found = self.bring("register", config, metrics)
        assert isinstance(found, ModelManifest)
        return found
