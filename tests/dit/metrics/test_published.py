from typing import Any

import pytest

from dit.metrics.published import METRICS, ROWS, Row, deviations, rows_for, unstated
from dit.samplers.config import SampleConfig

FID = "FID[inception-tf@6726825d]"
IMAGENET: dict[str, Any] = {"distance": FID, "images": 1_281_167, "classes": 1000, "resolution": 256}


def labelled(rows: list[Row]) -> list[tuple[str, object, float]]:
    return [(row.model, row.conditions.get("guidance_scale"), row.values[0]) for row in rows]


def test_rows_of_the_same_images_at_the_same_size() -> None:
    assert labelled(rows_for(**IMAGENET)) == [
        *[(f"DiT-{size}", 1.0, fid) for size, fid in {"S/2": 68.4, "B/2": 43.47, "L/2": 23.33, "XL/2": 19.47}.items()],
        ("DiT-XL/2", 1.0, 9.62),
        ("DiT-XL/2", 1.25, 3.22),
        ("DiT-XL/2", 1.5, 2.27),
        ("DiffiT", 4.4, 1.73),
        *[(f"SiT-{size}", 1.0, fid) for size, fid in {"S/2": 57.6, "B/2": 33.0, "L/2": 18.8, "XL/2": 17.2}.items()],
        ("SiT-XL/2", 1.0, 8.3),
        ("SiT-XL/2", 1.5, 2.06),
        ("SiT-XL/2 by an ODE", 1.5, 2.15),
        *[("LightningDiT-XL/1", scale, fid) for scale, fid in {1.0: 5.14, 10.0: 2.11}.items()],
        *[("LightningDiT-XL/1", scale, fid) for scale, fid in {1.0: 2.17, 6.7: 1.35}.items()],
        ("SiT-XL/2 with REPA-E, 80 epochs", 1.0, 4.07),
        ("SiT-XL/2 with REPA-E, 80 epochs, guided", None, 1.67),
        ("SiT-XL/2 with REPA, guided", None, 1.42),
        ("DiT-DH-XL on RAE, 80 epochs", 1.0, 2.16),
    ]
    dit, diffit, sit, edm2 = [12.03, 4.64, 3.04], 2.67, 2.62, [2.91, 2.23, 2.01, 1.88, 1.85, 1.81, 1.25]
    larger = rows_for(**IMAGENET | {"resolution": 512})
    assert [row.values[0] for row in larger] == [*dit, diffit, sit, *edm2]
    cifar = IMAGENET | {"images": 50_000, "classes": 10, "resolution": 32}
    assert [row.values for row in rows_for(**cifar)] == [(1.95,), (1.99,)]
    ffhq = IMAGENET | {"images": 70_000, "classes": 1, "resolution": 64}
    assert [row.values for row in rows_for(**ffhq)] == [(2.22,), (2.39,)]


@pytest.mark.parametrize(
    "change",
    [{"distance": "FD[dinov2@00112233]"}, {"images": 1_281_166}, {"classes": 100}, {"resolution": 128}],
)
def test_nothing_else_stands_beside_them(change: dict[str, Any]) -> None:
    assert rows_for(**IMAGENET | change) == []


def test_every_row_has_the_numbers_of_its_table() -> None:
    assert {len(row.values) for row in ROWS} == {1, len(METRICS)}
    assert {row.model for row in ROWS if len(row.values) == len(METRICS)} == {"DiT-XL/2", "DiffiT"}
    assert {row.data.name for row in ROWS if len(row.values) == len(METRICS)} == {"ImageNet"}


def test_conditions_of_a_row_are_those_of_our_samples() -> None:
    """So that none of them counts as another one by its name."""
    known = {*SampleConfig.model_fields, "training_steps"}
    assert {name for row in ROWS for name in row.conditions} <= known
    lightning = next(row for row in ROWS if row.values == (2.11,))
    assert lightning.conditions == {
        "guidance_scale": 10.0,
        "guidance_channels": "first3",
        "guidance_interval": "0.11 to 1",
        "sampler": "euler",
        "steps": 250,
        "shift": 0.3,
        "training_steps": 80_000,
    }
    assert unstated(lightning) == ["count", "labels"]
    assert unstated(next(row for row in ROWS if row.values[0] == 2.27)) == []
    assert [row.conditions["training_steps"] for row in ROWS if row.values == (1.35,)] == [1_000_000]


def test_what_was_other_is_named() -> None:
    row = next(row for row in ROWS if row.values[0] == 2.27)
    assert deviations(row, row.conditions | {"training_steps": 400_000, "seed": 3}) == []
    other = row.conditions | {"steps": 50, "count": 10_000, "guidance_scale": 4.0}
    assert deviations(row, other) == ["count 50000", "guidance_scale 1.5", "steps 250"]
    assert deviations(row, row.conditions | {"guide": "0" * 64}) == ["guide none"]
    autoguided = next(row for row in ROWS if row.values == (1.25,))
    assert deviations(autoguided, {"guide": "0" * 64}) == deviations(autoguided, {}) == ["guide a worse model"]
    assert len(deviations(row, {})) == len(row.conditions) - 1  # training is no deviation
