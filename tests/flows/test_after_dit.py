"""What came after DiT, taken together: it trains, goes on after a kill in the same bits, samples and is measured."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from small import KEPT, SHAPE, Small, few_digits

from dit.encode import EncodeConfig
from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.metrics.extractors.load import ExtractorRef
from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from dit.vae import VaeRef
from flows.contract import STAGES
from flows.demo import CLASSIFIER
from flows.recipe_file import RECIPES
from storage import uri
from storage.archives.open import ArchiveRef
from storage.manifest import Manifest
from storage.shards.shard import ShardConfig
from storage.tracker import NullTracker

STEPS, MILESTONE = 6, 3


@dataclass(frozen=True)
class Way:
    """A way to train, and ways to sample what it trained; each of these is guided by the milestone."""

    train: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)


WAYS = {
    "lightning": Way(
        {
            "model": {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True},
            "diffusion": {"kind": "flow", "times": "logit_normal", "cosine": 1.0},
            "normalise": "channel",
            "dispersive": {"block": 1},
            "ema_power": [0.05, 0.1],
            "precision": "bfloat16",
        },
        [
            {"sampler": "euler", "shift": 0.3, "guidance_interval": (0.11, 1), "weights": "power-0.1"},
            {"sampler": "heun", "guidance_schedule": "power_cosine", "guide_weights": "power-0.05"},
            {"sampler": "euler_maruyama", "diffusion_coefficient": "linear"},
        ],
    ),
    "flow to data": Way(
        {"diffusion": {"kind": "flow", "path": "gvp", "predict": "data"}, "model": {"label_dropout": 0.0}},
        [{"sampler": "dopri5", "rtol": 0.1}, {"sampler": "euler_maruyama", "diffusion_coefficient": "sbdm"}],
    ),
    "flow to noise": Way(
        {"diffusion": {"kind": "flow", "path": "vp", "predict": "noise"}, "model": {}},
        [{"sampler": "heun"}, {"sampler": "dopri5", "rtol": 0.1, "guidance_interval": (0.2, 1)}],
    ),
    "gaussian": Way(
        {"model": {"label_dropout": 0.0}, "normalise": "channel", "dispersive": {"block": 1}, "ema_power": [0.1]},
        [
            {"sampler": "dpm++", "guidance_schedule": "power_cosine"},
            {"sampler": "ddpm", "guidance_interval": (100, 900), "weights": "power-0.1", "guide_weights": "raw"},
        ],
    ),
}


QUICK = ("lightning", "gaussian")


class Killed(BaseException):
    """Ends a stage as a signal would."""


class Killer(NullTracker):
    """Kills training when it has taken a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def progress(self, done: int, total: int, unit: str) -> None:
        if done >= self.step:
            raise Killed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("root"), tracked=False)


@pytest.fixture(scope="module")
def latents(small: Small) -> Manifest:
    """Of the demo's autoencoder."""
    digits = few_digits(small.root / "digits", KEPT)
    archive = ArchiveRef(train=str(digits / "train"), held_out=str(digits / "held_out"))
    vae = VaeRef(source=str(RECIPES.parent / "demo" / "vae"))
    config = EncodeConfig(vae=vae, resolution=32, flips=False)
    return small.bring("encode", config, small.bring("shard", ShardConfig(images_per_shard=50), archive))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in WAYS]
)
def test_all_that_came_after_dit_from_a_kill_to_metrics(
    small: Small, latents: Manifest, tmp_path: Path, name: str
) -> None:
    way = WAYS[name]
    model = {"kind": "dit", "size": SHAPE.model_dump(), **way.train["model"]}
    config = TrainConfig.model_validate(
        {
            "steps": STEPS,
            "milestones": MILESTONE,
            "batch_size": 8,
            "learning_rate": 0.01,
            "ema_decay": 0.5,
            "flips": False,
            "checkpoint_every": 2,
            **way.train,
            "model": model,
        }
    )
    good = small.bring("train", config, latents)
    assert objects(good) == objects(through_a_kill(tmp_path, config, latents))
    shorter = config.model_copy(update={"steps": MILESTONE, "milestones": None})
    milestone = STAGES["train"].output(str(small.root), shorter, latents)
    for fields in way.samples:
        sampling = SampleConfig.model_validate(
            {"count": 20, "labels": "balanced", "steps": 3, "guide": milestone.uri, "batch_size": 20} | fields
        )
        samples = small.bring("sample", sampling, good)
        assert samples.inputs["guide"] == milestone.header.digest
        metrics = small.bring(
            "evaluate", EvaluateConfig(extractor=ExtractorRef(weights=str(CLASSIFIER)), batch_size=64), samples
        )
        assert isinstance(metrics, MetricsManifest)
        conditions = fields | {"guide": milestone.header.digest}
        if interval := fields.get("guidance_interval"):
            conditions["guidance_interval"] = f"{interval[0]:g} to {interval[1]:g}"
        assert conditions.items() <= metrics.conditions.items()
        assert 0 <= metrics.metrics["recognised"] <= 1


def through_a_kill(root: Path, config: TrainConfig, latents: Manifest) -> Manifest:
    """The same training in another root, killed after its milestone, and started again."""
    out = STAGES["train"].output(str(root), config, latents)
    with pytest.raises(Killed):
        STAGES["train"].run(config, latents, out=out, tracker=Killer(MILESTONE + 2))
    return STAGES["train"].run(config, latents, out=out, tracker=NullTracker())


def objects(manifest: Manifest) -> dict[str, bytes]:
    return {entry.path: uri.read(uri.join(manifest.uri, entry.path)) for entry in manifest.files}
