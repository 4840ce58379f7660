"""Augmentation of images: where things go, and what the labels say of it."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dit.models.diffit_image import AUGMENT_NUMBERS
from dit.random import Stream, uniforms
from dit.training.augment import DRAWS, augmented, resampled

P = 0.12
DONE = ["y_flip", "scale", "rotation", "stretch", "shift"]


def draws(**done: float) -> Tensor:
    """Uniform numbers (1, DRAWS) with which, at probability P, just what is named is done, by so much.

    Angles in radians, the others in standard deviations. A stretch is turned only if a direction is named.
    """
    numbers = [
        0.7,
        0.7,
        *(stats.uniform.cdf(done.get(n, 1.0), -math.pi, 2 * math.pi) for n in ("rotation", "direction")),
    ]
    numbers += [stats.norm.cdf(done.get(n, 1.0)) for n in ("scale", "stretch", "right", "down")]
    named = done.keys() | ({"shift"} if done.keys() & {"right", "down"} else set())
    numbers += [P - 0.01 if n in named else P + 0.01 for n in DONE]
    numbers.append(0.49 if "direction" in done else 0.51)
    for place, name in enumerate(("x_flip", "y_flip")):
        numbers[place] = 0.3 if name in done else 0.7
    return torch.tensor([numbers], dtype=torch.float64)


def keyed(step: int, rows: list[int]) -> Tensor:
    return torch.from_numpy(uniforms(3, Stream.AUGMENT, step, rows, DRAWS))


def images(count: int, height: int = 32, width: int = 32) -> Tensor:
    return 2 * torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) - 1


def blob(x: float, y: float, height: int = 64, width: int = 64) -> Tensor:
    """A Gaussian blob (1, 1, H, W) at a place in pixels from the centre."""
    columns = torch.arange(width) + 0.5 - width / 2
    rows = torch.arange(height)[:, None] + 0.5 - height / 2
    return torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)[None, None]


def centre(image: Tensor, near: NDArray[np.float64]) -> tuple[float, float]:
    """Centroid of what lies within 8 px of a place; beyond may lie the blob's mirror images."""
    height, width = image.shape[2:]
    x = torch.arange(width) + 0.5 - width / 2
    y = torch.arange(height)[:, None] + 0.5 - height / 2
    mass = image[0, 0].double() * ((x - near[0]) ** 2 + (y - near[1]) ** 2 < 64)
    return float((mass * x).sum() / mass.sum()), float((mass * y).sum() / mass.sum())


def turning(angle: float) -> NDArray[np.float64]:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def test_what_is_not_done_leaves_the_bits_and_labels_of_zero() -> None:
    x0 = images(1)
    found, labels = augmented(x0, draws(), P)
    assert torch.equal(found, x0)
    assert torch.equal(labels, torch.zeros(1, AUGMENT_NUMBERS))
    assert labels.dtype == torch.float32


def test_probability_zero_does_nothing_at_all() -> None:
    x0, u = images(64), keyed(0, list(range(64)))
    found, labels = augmented(x0, u, 0)
    assert torch.equal(found, x0)
    assert not labels.any()
    assert augmented(x0, u, 1e-12)[1][:, 0].any()


@pytest.mark.parametrize(("flips", "axes"), [(["x_flip"], [3]), (["y_flip"], [2]), (["x_flip", "y_flip"], [2, 3])])
def test_flips_are_mirrors_to_the_bit(flips: list[str], axes: list[int]) -> None:
    x0 = images(1, 16, 32)
    found, labels = augmented(x0, draws(**dict.fromkeys(flips, 1.0)), P)
    assert torch.equal(found, x0.flip(axes))
    assert labels[0].tolist() == [float("x_flip" in flips), float("y_flip" in flips)] + [0.0] * 7


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ({"scale": -1.3}, {2: -1.3}),
        ({"rotation": 2.0}, {3: math.cos(2) - 1, 4: math.sin(2)}),
        ({"stretch": 0.7, "direction": -2.5}, {5: 0.7 * math.cos(2.5), 6: -0.7 * math.sin(2.5)}),
        ({"stretch": 0.7}, {5: 0.7}),
        ({"right": 0.4, "down": -1.9}, {7: 0.4, 8: -1.9}),
        ({"x_flip": 1, "scale": 2, "right": 1, "down": 0}, {0: 1, 2: 2, 7: 1}),
    ],
)
def test_labels_in_closed_form(done: dict[str, float], expected: dict[int, float]) -> None:
    label = augmented(images(1), draws(**done), P)[1][0]
    np.testing.assert_allclose(label, [expected.get(i, 0.0) for i in range(AUGMENT_NUMBERS)], atol=1e-6)


@pytest.mark.parametrize(
    ("done", "matrix"),
    [
        ({"scale": 2.0}, 2**0.4 * np.eye(2)),
        ({"rotation": 2.0}, turning(2.0)),
        ({"stretch": 1.5}, np.diag([2**0.3, 2**-0.3])),
        ({"stretch": 1.5, "direction": 0.6}, turning(0.6) @ np.diag([2**0.3, 2**-0.3]) @ turning(-0.6)),
        (
            {"x_flip": 1, "y_flip": 1, "scale": -1, "rotation": 0.5, "stretch": 1.5, "direction": 2.0},
            turning(2) @ np.diag([2**0.3, 2**-0.3]) @ turning(-2) @ turning(0.5) * 2**-0.2 @ -np.eye(2),
        ),
        ({"right": 0.9, "down": -0.65}, np.eye(2)),
        ({"y_flip": 1, "rotation": -1.0, "right": 0.9, "down": -0.65}, turning(-1) @ np.diag([1, -1])),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_a_point_goes_where_the_matrix_says(
    done: dict[str, float], matrix: NDArray[np.float64], height: int, width: int
) -> None:
    at = np.array([5.3, -4.1])
    expected = matrix @ at + [done.get("right", 0) * width / 8, done.get("down", 0) * height / 8]
    found = augmented(blob(*at, height, width), draws(**done), P)[0]
    np.testing.assert_allclose(centre(found, expected), expected, atol=0.02)


def test_whole_shift_of_a_smooth_image_keeps_its_values() -> None:
    found = resampled(blob(2.0, -3.0), torch.eye(2)[None].double(), torch.tensor([[4.0, 7.0]]))
    torch.testing.assert_close(found, blob(6.0, 4.0), rtol=0, atol=0.02)


@pytest.mark.parametrize("axis", [2, 3])
def test_what_comes_from_beyond_an_edge_is_the_mirror_image(axis: int) -> None:
    x = blob(9.0, 5.0)
    shift = torch.tensor([[0.0, 64.0] if axis == 2 else [64.0, 0.0]])
    torch.testing.assert_close(resampled(x, torch.eye(2)[None], shift), x.flip(axis), rtol=0, atol=0.02)


def test_what_an_image_made_smaller_cannot_show_does_not_come_back_as_something_else() -> None:
    """A wave of 0.45 cycles a pixel has 0.9 at half the size, and would fold to one of 0.1."""
    wave = torch.cos(2 * math.pi * 0.45 * torch.arange(64.0)).expand(1, 1, 64, 64)
    found = resampled(wave, 2 * torch.eye(2)[None], torch.zeros(1, 2))
    assert found[..., 20:44].abs().max() < 0.01


@pytest.mark.parametrize(
    ("cycles", "lowest", "highest"),
    [(0.05, 1.00, 1.00), (0.125, 1.02, 1.02), (0.25, 1.00, 1.05), (0.35, 0.78, 1.00)],
)
def test_gain_of_a_wave_over_directions_angles_and_shifts(cycles: float, lowest: float, highest: float) -> None:
    """The figures of docs/numerics.md."""
    gains = [gain(cycles, *numbers) for numbers in np.random.default_rng(0).uniform(-math.pi, math.pi, (40, 4))]
    gains += [gain(cycles, direction, 0.0, 0.5, 0.25) for direction in (0.0, math.pi / 4)]
    assert min(gains) == pytest.approx(lowest, abs=0.01)
    assert max(gains) == pytest.approx(highest, abs=0.01)


def gain(cycles: float, direction: float, angle: float, right: float, down: float) -> float:
    """By how much a plane wave with so many cycles per pixel is larger after it was turned and shifted."""
    place = torch.arange(64, dtype=torch.float64) + 0.5 - 32
    inverse = torch.from_numpy(turning(-angle))
    x, y = place - right, place[:, None] - down
    before = wave(cycles, direction, place, place[:, None])
    after = wave(cycles, direction, *(row[0] * x + row[1] * y for row in inverse))
    image = torch.view_as_real(before).permute(2, 0, 1)[None].float()
    moved = resampled(image, inverse[None], torch.tensor([[right, down]]))
    inner = slice(20, 44)
    return float((torch.complex(*moved[0].double()) * after.conj())[inner, inner].mean().abs())


def wave(cycles: float, direction: float, x: Tensor, y: Tensor) -> Tensor:
    """exp(2 pi i f (x cos a + y sin a)), whose magnitude is 1."""
    phase = 2 * math.pi * cycles * (math.cos(direction) * x + math.sin(direction) * y)
    return torch.polar(torch.ones_like(phase), phase)


def test_one_colour_stays_one_colour() -> None:
    u = keyed(0, list(range(32)))
    colour = torch.tensor([-1.0, 0.3, 1.0]).reshape(1, 3, 1, 1)
    found = augmented(colour.expand(32, 3, 16, 16), u, 1.0)[0]
    torch.testing.assert_close(found, colour.expand_as(found), rtol=0, atol=2e-6)


@pytest.mark.parametrize("cut", [1, 5, 24])
def test_an_image_does_not_depend_on_its_batch(cut: int) -> None:
    x0, rows = images(40), list(range(40))
    whole = augmented(x0, keyed(7, rows), 0.5)
    parts = [augmented(x0[i : i + cut], keyed(7, rows[i : i + cut]), 0.5) for i in range(0, 40, cut)]
    for place in (0, 1):
        assert torch.equal(torch.cat([part[place] for part in parts]), whole[place])


def test_each_is_done_as_often_as_it_should_and_independently() -> None:
    count = 20_000
    labels = augmented(torch.zeros(count, 1, 2, 2), keyed(0, list(range(count))), P)[1]
    assert labels.isfinite().all()
    done = torch.stack([labels[:, 0], labels[:, 1], *(labels[:, i] for i in (2, 4, 5, 7, 8))], 1) != 0
    for column, chance in zip(done.T, (0.5, P / 2, P, P, P, P, P), strict=True):
        assert abs(float(column.float().mean()) - chance) < 4 * (chance * (1 - chance) / count) ** 0.5
    pairs = torch.corrcoef(done[:, :-1].T.double()) - torch.eye(6)
    assert pairs.abs().max() < 4 / count**0.5
    stretched = labels[labels[:, 5] != 0]
    oblique = stretched[stretched[:, 6] != 0]
    assert abs(len(oblique) / len(stretched) - 0.5) < 2 / len(stretched) ** 0.5
    directions = torch.atan2(oblique[:, 6], oblique[:, 5])
    assert stats.kstest(directions, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 0.001
    for place in (2, 7, 8):
        assert stats.kstest(labels[labels[:, place] != 0, place], "norm").pvalue > 0.001
    turned = labels[labels[:, 4] != 0]
    angles = torch.atan2(turned[:, 4], turned[:, 3] + 1)
    assert stats.kstest(angles, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 0.001


def test_the_ends_of_the_uniform_numbers_give_images_too() -> None:
    u = torch.stack([torch.zeros(DRAWS), torch.full((DRAWS,), 1 - 2**-53, dtype=torch.float64)])
    found, labels = augmented(images(2), u, 1.0)
    assert found.isfinite().all()
    assert labels.isfinite().all()
