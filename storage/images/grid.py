"""Grids of images for people to look at."""

# N = images, H, W = height and width in pixels

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GREY = 128


def image_grid(images: NDArray[np.uint8], columns: int, gap: int = 0) -> bytes:
    """A grid of images in reading order, as a PNG. Unused cells are black.

    Args:
        images: (N, H, W, 3) uint8, N >= 1.
        columns: images in a row; with fewer images the grid is narrower.
        gap: grey pixels between neighbours.

    Returns:
        Bytes of the PNG; the same images give the same bytes.

    Examples:
        >>> image_grid(np.zeros((10, 8, 8, 3), np.uint8), columns=5, gap=2)[1:4]
        b'PNG'
    """
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + gap, width + gap, channels), GREY, np.uint8)
    cells[:, :height, :width] = 0
    cells[:count, :height, :width] = images
    grid = cells.reshape(rows, columns, height + gap, width + gap, channels).swapaxes(1, 2)
    picture = grid.reshape(rows * (height + gap), columns * (width + gap), channels)
    buffer = io.BytesIO()
    Image.fromarray(picture[: len(picture) - gap, : picture.shape[1] - gap]).save(buffer, "PNG")
    return buffer.getvalue()
