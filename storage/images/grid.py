"""Pictures for people to look at."""

# N = images, H, W = pixels, C = 3 colours

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GREY = 128


def image_grid(images: NDArray[np.uint8], columns: int, gap: int = 0) -> bytes:
    """Images side by side in reading order, as a PNG; the cells left over are black.

    Args:
        images: (N, H, W, 3) uint8, N >= 1.
        columns: images in a row; fewer images than that make a narrower grid.
        gap: grey pixels between neighbours.

    Returns:
        The PNG, the same bytes for the same images.
    """
    count, height, width, colours = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + gap, width + gap, colours), GREY, np.uint8)
    cells[:, :height, :width] = 0
    cells[:count, :height, :width] = images
    grid = cells.reshape(rows, columns, height + gap, width + gap, colours).swapaxes(1, 2)
    picture = grid.reshape(rows * (height + gap), columns * (width + gap), colours)
    buffer = io.BytesIO()
    Image.fromarray(picture[: len(picture) - gap, : picture.shape[1] - gap]).save(buffer, "PNG")
    return buffer.getvalue()
