from typing import Any

import pytest

from dit.metrics.published import METRICS, ROWS, Row, deviations, rows_for

FID = "FID[inception-tf@6726825d]"
IMAGENET: dict[str, Any] = {"distance": FID, "images": 1_281_167, "classes": 1000, "resolution": 256}


def labelled(rows: list[Row]) -> list[tuple[str, object, float]]:
    return [(row.model, row.conditions.get("guidance_scale"), row.values[0]) for row in rows]


def test_rows_of_the_same_images_at_the_same_size() -> None:
    assert labelled(rows_for(**IMAGENET)) == [
        ("DiT-XL/2", 1.0, 9.62),
        ("DiT-XL/2", 1.25, 3.22),
        ("DiT-XL/2", 1.5, 2.27),
        ("DiffiT", 4.4, 1.73),
    ]
    assert [row.values[0] for row in rows_for(**IMAGENET | {"resolution": 512})] == [12.03, 4.64, 3.04, 2.67]
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
    assert {len(row.values) for row in ROWS if row.data.name == "ImageNet"} == {len(METRICS)}
    assert {len(row.values) for row in ROWS if row.data.name != "ImageNet"} == {1}


def test_what_was_other_is_named() -> None:
    row = next(row for row in ROWS if row.values[0] == 2.27)
    assert deviations(row, row.conditions | {"training_steps": 400_000, "seed": 3}) == []
    other = row.conditions | {"steps": 50, "count": 10_000, "guidance_scale": 4.0}
    assert deviations(row, other) == ["count 50000", "guidance_scale 1.5", "steps 250"]
    assert len(deviations(row, {})) == len(row.conditions) - 1  # training is no deviation
