import io

import numpy as np
from PIL import Image

from storage.images.grid import image_grid


def test_grid_places_images_in_reading_order() -> None:
    images = np.random.default_rng(0).integers(1, 256, (5, 4, 6, 3), np.uint8)
    png = image_grid(images, 3)
    grid = np.asarray(Image.open(io.BytesIO(png)))
    assert grid.shape == (8, 18, 3)
    for i, image in enumerate(images):
        top, left = 4 * (i // 3), 6 * (i % 3)
        assert np.array_equal(grid[top : top + 4, left : left + 6], image)
    assert not grid[4:, 12:].any()
    assert png == image_grid(images.copy(), 3)


def test_few_images_make_a_narrow_grid() -> None:
    png = image_grid(np.full((2, 4, 4, 3), 9, np.uint8), 8)
    assert Image.open(io.BytesIO(png)).size == (8, 4)


def test_gap_is_only_between_neighbours() -> None:
    images = np.full((4, 4, 4, 3), 9, np.uint8)
    grid = np.asarray(Image.open(io.BytesIO(image_grid(images, 2, gap=2))))
    assert grid.shape == (10, 10, 3)
    assert (grid[4:6] == 128).all()
    assert (grid[:, 4:6] == 128).all()
    assert (grid[:4, :4] == 9).all()
    assert (grid[6:, 6:] == 9).all()
