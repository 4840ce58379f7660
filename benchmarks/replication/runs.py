"""The finished runs of the sweeps in this folder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy import stats

from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.metrics.comparison import Estimate
from dit.models.config import PatchTransformerConfig
from dit.models.cost import cost
from dit.sample import SampleManifest
from dit.samplers.config import SampleConfig
from dit.samplers.table import sampler
from flows.sweep import load_recipes
from storage.errors import InputError


@dataclass(frozen=True)
class Run:
    """A trained transformer, its samples and their metrics."""

    metrics: MetricsManifest
    HEADER: ClassVar = (
        "| model | seed | steps | GMAC | sampler, passes | guidance | FD (95 %) | recognised | precision | recall |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )

    @cached_property
    def samples(self) -> SampleManifest:
        """The samples that were evaluated."""
        return self.metrics.parent("samples", SampleManifest)

    @cached_property
    def checkpoint(self) -> CheckpointManifest:
        """The model."""
        return self.samples.parent("checkpoint", CheckpointManifest)

    @property
    def network(self) -> PatchTransformerConfig:
        """The network's config."""
        model = self.checkpoint.card.model
        assert isinstance(model, PatchTransformerConfig)
        return model

    @property
    def size(self) -> str:
        """Depth, width and heads, such as ``4x128x4``."""
        return f"{self.network.depth}x{self.network.width}x{self.network.heads}"

    @property
    def model(self) -> str:
        """Size and patch, such as ``4x128x4/2``."""
        return f"{self.size}/{self.network.patch_size}"

    @property
    def variant(self) -> str:
        """What sets the network apart from others of its size: process, and how its blocks know time and class."""
        model, process = self.network, self.checkpoint.card.diffusion.kind
        block = getattr(model, "block", None) or getattr(model, "condition", "tmsa")
        return f"{model.kind} {block}" + ("" if process == "gaussian" else f", {process}")

    @property
    def seed(self) -> int:
        """Seed of training."""
        return int(self.checkpoint.config["seed"])

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.checkpoint.counts["steps"]

    @cached_property
    def gmac(self) -> float:
        """10^9 multiply-accumulates of a forward pass of one image."""
        return cost(self.network).macs / 1e9

    @property
    def training_flops(self) -> float:
        """FLOPs of training so far: six for each multiply-accumulate of each image seen."""
        return 6e9 * self.gmac * self.checkpoint.counts["images_seen"]

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; 1 is none."""
        return float(self.metrics.conditions["guidance_scale"])

    @property
    def passes(self) -> int:
        """Passes of the network for an image, without those for guidance."""
        config = SampleConfig.model_validate(self.samples.config)
        return sampler(config, self.checkpoint.card.diffusion).passes(config.steps)

    @property
    def sampling_gmac(self) -> float:
        """10^9 multiply-accumulates of the network to sample one image without guidance."""
        return self.gmac * self.passes

    @property
    def distance(self) -> Estimate:
        """The distance to the training images."""
        return self.metrics.estimate

    def row(self) -> str:
        """The row of a table."""
        metrics = self.metrics.metrics
        shares = (f"{metrics[name]:.3f}" for name in ("recognised", "precision_fp32", "recall_fp32"))
        sampling = f"{self.metrics.conditions['sampler']}, {self.passes}"
        cells = f"{self.variant} {self.model}", self.seed, f"{self.steps:,}", f"{self.gmac:.3g}", sampling
        return f"| {' | '.join(map(str, (*cells, self.guidance_scale, self.distance, *shares)))} |"


def finished(sweep: str, overrides: Sequence[str], root: str) -> list[Run]:
    """The runs of a sweep in this folder, with their milestones if the sweep evaluates those.

    Raises:
        InputError: one of them is not finished.
    """
    found = []
    for recipe in load_recipes(str(Path(__file__).parent / f"{sweep}.yaml"), overrides, root):
        made = recipe.finished(root, before="register")
        if made is None:
            raise InputError(f"{recipe.name}: not finished; run the sweep {sweep} first")
        evaluations = [*recipe.evaluations(root, made).values()] or [MetricsManifest.read(made[-1].url)]
        found += [Run(each) for each in evaluations if each is not None]
    return found


def over_seeds(runs: Sequence[Run]) -> dict[str, Estimate]:
    """The mean distance of each variant over its seeds of training, with its 95 % interval for other seeds.

    The spread of seeds is pooled over the variants, so that two seeds of each are enough (Student's t). Without two
    seeds of any variant there is no interval.
    """
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault(run.variant, []).append(run.distance.value)
    freedom = len(runs) - len(found)
    if not freedom:
        return {variant: Estimate(values[0]) for variant, values in found.items()}
    spread = math.sqrt(sum(len(values) * np.var(values) for values in found.values()) / freedom)
    estimates = {}
    for variant, values in found.items():
        mean, margin = float(np.mean(values)), stats.t.ppf(0.975, freedom) * spread / math.sqrt(len(values))
        estimates[variant] = Estimate(mean, mean - margin, mean + margin)
    return estimates
