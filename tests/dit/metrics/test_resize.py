import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit.metrics.extractors.resize import resize_tf1


def by_loops(image: np.ndarray, side: int) -> np.ndarray:
    """One pixel after the other, from the definition."""
    height, width = image.shape
    out = np.empty((side, side), np.float64)
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = int(y), int(x)
            rows = image[[top, min(top + 1, height - 1)]].astype(np.float64)
            upper, lower = rows[:, left] + (rows[:, min(left + 1, width - 1)] - rows[:, left]) * (x - left)
            out[i, j] = upper + (lower - upper) * (y - top)
    return out


def pictures(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, height, width)).astype(np.float32))


@pytest.mark.parametrize(("height", "width", "side"), [(4, 7, 9), (9, 6, 5), (1, 3, 4), (8, 8, 23)])
def test_every_pixel_is_the_definition(height: int, width: int, side: int) -> None:
    images = pictures(height, width)
    found = resize_tf1(images, side).numpy()
    for image, resized in zip(images.flatten(0, 1).numpy(), found.reshape(-1, side, side), strict=True):
        np.testing.assert_allclose(resized, by_loops(image, side), rtol=1e-5, atol=1e-4)


def test_doubling_by_hand() -> None:
    image = torch.tensor([[0.0, 10], [100, 110]]).view(1, 1, 2, 2)
    row = torch.tensor([0.0, 5, 10, 10])
    expected = row + torch.tensor([0.0, 50, 100, 100])[:, None]
    assert torch.equal(resize_tf1(image, 4)[0, 0], expected)


def test_half_a_pixel_is_seen() -> None:
    images = pictures(32, 32)
    half_pixel = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False, antialias=False)
    corners = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=True)
    for other in (half_pixel, corners):
        assert (resize_tf1(images, 299) - other).abs().mean() > 1


def test_the_same_size_is_the_same_image() -> None:
    images = pictures(299, 299)
    assert torch.equal(resize_tf1(images, 299), images)
