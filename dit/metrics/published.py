"""Metrics that papers report, with their conditions, and how these differ from those of our metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dit.metrics.comparison import OWN

Value = str | int | float

DIT: Final = "Peebles & Xie, arXiv 2212.09748"
DIFFIT: Final = "Hatamizadeh et al., arXiv 2312.02139"
SIT: Final = "Ma et al., arXiv 2401.08740"
LIGHTNING: Final = "Yao et al., arXiv 2501.01423"
REPA: Final = "Yu et al., arXiv 2410.06940"
REPA_E: Final = "Leng et al., arXiv 2504.10483"
RAE: Final = "Zheng et al., arXiv 2510.11690"
EDM2: Final = "Karras et al., arXiv 2312.02696"
AUTOGUIDANCE: Final = "Karras et al., arXiv 2406.02507"
ANCESTRAL: Final[dict[str, Value]] = {"count": 50_000, "labels": "random", "sampler": "ddpm", "steps": 250}
GUIDED: Final[dict[str, Value]] = {"guidance_channels": "first3", "guidance_schedule": "constant"}
UNAIDED: Final[dict[str, Value]] = {"guide": "none"}
SDE: Final[dict[str, Value]] = {
    "sampler": "euler_maruyama",
    "steps": 250,
    "diffusion_coefficient": "sigma",
    "last_step": 0.04,
}
EULER: Final[dict[str, Value]] = {"sampler": "euler", "steps": 250, "shift": 0.3}
MAIN: Final = ("count", "labels", "sampler", "steps")
"""Conditions that every number depends on."""
METRICS: Final = ("fid", "sfid", "inception_score", "precision_adm_fp16", "recall_adm_fp16")


@dataclass(frozen=True)
class DataSet:
    """A set of training images, identified by its numbers of images and classes."""

    name: str
    images: int
    classes: int | None
    """None where it does not identify the set."""


IMAGENET: Final = DataSet("ImageNet", 1_281_167, 1000)
CIFAR10: Final = DataSet("CIFAR-10", 50_000, 10)
FFHQ: Final = DataSet("FFHQ", 70_000, None)


@dataclass(frozen=True)
class Row:
    """One line of a paper's table."""

    model: str
    source: str
    data: DataSet
    resolution: int
    values: tuple[float, ...]
    """In the order of `METRICS`; fewer values are the first ones."""
    conditions: dict[str, Value] = field(default_factory=dict)
    """Conditions that the paper states or its published code sets, under our names."""


def _dit(resolution: int, steps: int, scale: float, *values: float, size: str = "XL/2") -> Row:
    guidance = {"guidance_scale": scale} | (GUIDED if scale > 1 else {})
    conditions = ANCESTRAL | guidance | {"training_steps": steps, "rounding": "nearest"}
    return Row(f"DiT-{size}", DIT, IMAGENET, resolution, values, conditions)


def _diffit(resolution: int, scale: float, schedule: str, *values: float) -> Row:
    guidance: dict[str, Value] = GUIDED | {"guidance_scale": scale, "guidance_schedule": schedule}
    return Row("DiffiT", DIFFIT, IMAGENET, resolution, values, ANCESTRAL | guidance | {"rounding": "down"})


def _edm(model: str, source: str, data: DataSet, resolution: int, steps: int, fid: float) -> Row:
    conditions: dict[str, Value] = {"count": 50_000, "labels": "none", "sampler": "heun", "steps": steps}
    return Row(model, source, data, resolution, (fid,), conditions)


def _flow(model: str, source: str, fid: float, scale: float, **conditions: Value) -> Row:
    return Row(model, source, IMAGENET, 256, (fid,), {"guidance_scale": scale, **conditions})


def _sit(size: str, trained: int, fid: float, scale: float = 1.0, **conditions: Value) -> Row:
    return _flow(f"SiT-{size}", SIT, fid, scale, training_steps=trained, **conditions)


def _imagenet(model: str, source: str, resolution: int, fid: float, **conditions: Value) -> Row:
    return Row(model, source, IMAGENET, resolution, (fid,), conditions)


def _lightning(epochs: int, fid: float, scale: float = 1.0) -> Row:
    guided = {"guidance_channels": "first3", "guidance_interval": "0.11 to 1"} if scale > 1 else {}
    steps = 1_250 * epochs  # of 1,024 images
    return _flow("LightningDiT-XL/1", LIGHTNING, fid, scale, training_steps=steps, **EULER, **guided)


ROWS: Final = (
    _dit(256, 400_000, 1.0, 68.40, size="S/2"),
    _dit(256, 400_000, 1.0, 43.47, size="B/2"),
    _dit(256, 400_000, 1.0, 23.33, size="L/2"),
    _dit(256, 400_000, 1.0, 19.47),
    _dit(256, 7_000_000, 1.0, 9.62, 6.85, 121.50, 0.67, 0.67),
    _dit(256, 7_000_000, 1.25, 3.22, 5.28, 201.77, 0.76, 0.62),
    _dit(256, 7_000_000, 1.5, 2.27, 4.60, 278.24, 0.83, 0.57),
    _dit(512, 3_000_000, 1.0, 12.03, 7.12, 105.25, 0.75, 0.64),
    _dit(512, 3_000_000, 1.25, 4.64, 5.77, 174.77, 0.81, 0.57),
    _dit(512, 3_000_000, 1.5, 3.04, 5.02, 240.82, 0.84, 0.54),
    _diffit(256, 4.4, "power_cosine", 1.73, 4.54, 276.49, 0.80, 0.62),
    _diffit(512, 1.49, "constant", 2.67, 4.99, 252.12, 0.83, 0.55),
    _sit("S/2", 400_000, 57.6),
    _sit("B/2", 400_000, 33.0),
    _sit("L/2", 400_000, 18.8),
    _sit("XL/2", 400_000, 17.2),
    _sit("XL/2", 7_000_000, 8.3),
    _sit("XL/2", 7_000_000, 2.06, 1.5, **SDE),
    _sit("XL/2 by an ODE", 7_000_000, 2.15, 1.5),
    _lightning(64, 5.14),
    _lightning(64, 2.11, 10.0),
    _lightning(800, 2.17),
    _lightning(800, 1.35, 6.7),
    _flow("SiT-XL/2 with REPA-E, 80 epochs", REPA_E, 4.07, 1.0),
    _imagenet("SiT-XL/2 with REPA-E, 80 epochs, guided", REPA_E, 256, 1.67),
    _imagenet("SiT-XL/2 with REPA, guided", REPA, 256, 1.42),
    _flow("DiT-DH-XL on RAE, 80 epochs", RAE, 2.16, 1.0),
    _imagenet("SiT-XL/2, guided", SIT, 512, 2.62),
    _imagenet("EDM2-XS, guided", EDM2, 512, 2.91),
    _imagenet("EDM2-S, guided", EDM2, 512, 2.23),
    _imagenet("EDM2-M, guided", EDM2, 512, 2.01),
    _imagenet("EDM2-L, guided", EDM2, 512, 1.88),
    _imagenet("EDM2-XL, guided", EDM2, 512, 1.85),
    _imagenet("EDM2-XXL, guided", EDM2, 512, 1.81),
    _imagenet("EDM2 with autoguidance", AUTOGUIDANCE, 512, 1.25, guide="a worse model"),
    _edm("DiffiT", DIFFIT, CIFAR10, 32, 18, 1.95),
    _edm("EDM (VP)", DIFFIT, CIFAR10, 32, 18, 1.99),
    _edm("DiffiT", DIFFIT, FFHQ, 64, 40, 2.22),
    _edm("EDM (VP)", DIFFIT, FFHQ, 64, 40, 2.39),
)
"""Rows as the papers print them, without conditions that a paper does not state."""


def rows_for(*, distance: str, images: int, classes: int, resolution: int) -> list[Row]:
    """The rows of the same images at the same size in the same feature space.

    Args:
        distance: name of the distance; papers report FID.
        images: number of training images that the samples were compared with.
        classes: number of their classes.
        resolution: side of the samples, in pixels.
    """
    if not distance.startswith("FID["):
        return []
    return [
        row
        for row in ROWS
        if row.resolution == resolution and row.data.images == images and row.data.classes in (None, classes)
    ]


def deviations(row: Row, conditions: Mapping[str, Value]) -> list[str]:
    """Conditions of a row that differ from ours, such as ``steps 250``; the training steps may differ.

    Unless a row says so, it was not guided by another model.
    """
    theirs, ours = UNAIDED | row.conditions, {**UNAIDED, **conditions}
    return [f"{name} {theirs[name]}" for name in sorted(theirs.keys() - OWN) if ours.get(name) != theirs[name]]


def unstated(row: Row) -> list[str]:
    """The main conditions of a number that are not known of a row."""
    return [name for name in MAIN if name not in row.conditions]
