"""Scaling: the Fréchet distance against compute over the finished runs of a sweep, with a fitted power law."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.metrics.comparison import Estimate, differing
from dit.metrics.power_law import PowerLaw, fit
from dit.models.cost import cost
from dit.report.plots import scaling as plot
from dit.sample import SampleManifest
from flows.recipe import Recipe
from flows.report.kept import ScalingManifest, keep, output
from flows.sweep import load_recipes
from storage.config import Config
from storage.errors import InputError

VERSION = 1
PICTURE = "scaling.png"


class ScalingConfig(Config):
    """What the plot shows besides the metrics."""

    names: tuple[str, ...]
    """Names of the recipes, by the compute of their runs."""


@dataclass(frozen=True)
class Run:
    """A trained model, its compute, and the distance of its samples."""

    name: str
    parameters: int
    gmac: float
    """10^9 multiply-accumulates of one forward pass of one image."""
    images_seen: int
    training_flops: float
    distance: Estimate
    samples: int
    manifest: str
    """URL of the metrics."""

    def cells(self) -> tuple[str, ...]:
        """Table cells: name, million parameters, GMAC, images seen, training FLOPs and distance."""
        counts = f"{self.parameters / 1e6:.3g}", f"{self.gmac:.3g}", f"{self.images_seen:,}"
        return self.name, *counts, f"{self.training_flops:.3g}", str(self.distance)


@dataclass(frozen=True)
class Scaling:
    """The runs of a sweep and the fits."""

    distance: str
    """Name of the distance with its feature extractor."""
    runs: list[Run]
    missing: list[str]
    """Recipes that have no metrics yet."""
    fits: dict[str, PowerLaw]
    """The power law by its variable: training FLOPs, or GMAC."""
    picture: str
    """URL of the plot, a PNG."""

    def as_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self))


def scaling(names: Sequence[str], overrides: Sequence[str], root: str) -> Scaling:
    """Fit the distance over the finished runs of recipes or sweeps.

    The distance is fitted against the training FLOPs, and against the GMAC of the model if all have
    seen equally many images. Training takes six FLOPs for each multiply-accumulate of each image seen.

    Raises:
        InputError: a recipe is wrong or has no metrics, fewer than two sizes are done, or the runs do not compare.
    """
    recipes = [recipe for name in names for recipe in load_recipes(name, overrides, root)]
    finished = [(recipe.name, _metrics(recipe, root)) for recipe in recipes]
    missing = list(dict.fromkeys(name for name, metrics in finished if metrics is None))
    done = {metrics.digest: (name, metrics) for name, metrics in finished if metrics}
    _check(list(done.values()))
    runs = sorted((_run(*each) for each in done.values()), key=lambda run: run.training_flops)
    if len({run.gmac for run in runs}) < 2 or len({run.training_flops for run in runs}) < 2:
        raise InputError(
            f"scaling: a fit needs finished runs of two model sizes; {len(runs)} of {len(finished)} runs are finished; "
            f"run the rest first ({', '.join(missing) or 'none is missing'})"
        )
    _, first = next(iter(done.values()))
    shown = {f"{metrics.stage} {metrics.folder_name}": metrics for _, metrics in done.values()}
    laws = _laws(runs)
    out = output(ScalingManifest, VERSION, ScalingConfig(names=tuple(run.name for run in runs)), shown, root)
    names, distances = [run.name for run in runs], [run.distance for run in runs]
    keep(out, ScalingManifest, PICTURE, lambda: plot(names, distances, first.distance, laws))
    return Scaling(first.distance, runs, missing, {x: law for x, (_, law) in laws.items()}, out.url(PICTURE))


def _metrics(recipe: Recipe, root: str) -> MetricsManifest | None:
    recipe.config_of(MetricsManifest.STAGE)
    done = recipe.finished(root, before="register")
    return MetricsManifest.read(done[-1].url) if done else None


def _check(done: Sequence[tuple[str, MetricsManifest]]) -> None:
    """Check that all runs were evaluated under the same conditions."""
    for name, metrics in done[1:]:
        first, other = done[0]
        different = differing(metrics.conditions, other.conditions)
        if different:
            raise InputError(f"scaling: {first} and {name} cannot be compared; they differ in {', '.join(different)}")


def _run(name: str, metrics: MetricsManifest) -> Run:
    checkpoint = metrics.parent("samples", SampleManifest).parent("checkpoint", CheckpointManifest)
    finished, seen = cost(checkpoint.card.model), checkpoint.counts["images_seen"]
    return Run(
        name=name,
        parameters=finished.parameters,
        gmac=finished.macs / 1e9,
        images_seen=seen,
        training_flops=float(finished.training_flops * seen),
        distance=metrics.estimate,
        samples=metrics.counts["samples"],
        manifest=metrics.url,
    )


def _laws(runs: Sequence[Run]) -> dict[str, tuple[list[float], PowerLaw]]:
    """For each variable its values and the power law."""
    places = {"training FLOPs": [run.training_flops for run in runs]}
    if len({run.images_seen for run in runs}) == 1:
        places["GMAC"] = [run.gmac for run in runs]
    return {name: (x, fit(x, [run.distance.value for run in runs])) for name, x in places.items()}
