"""Synthetic photographs without copyright: noise with the spectrum of natural images."""

# H, W = pixels

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 90
"""The most frequent size in ImageNet."""


def photo(number: int) -> NDArray[np.uint8]:
    """Colours (H, W, 3) whose amplitudes fall with the frequency, as natural images' do (Field 1987)."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf  # no mean
    spectra = np.fft.rfft2(rng.normal(size=(3, HEIGHT, WIDTH))) / frequency
    fields = np.fft.irfft2(spectra, (HEIGHT, WIDTH))
    colours = np.tensordot([[1, 0.4, 0.2], [1, 0, -0.2], [1, -0.4, 0.2]], fields, 1)  # correlated channels
    pixels: NDArray[np.uint8] = (128 + 50 * colours / colours.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(pixels)


def jpeg(number: int) -> bytes:
    """Such a picture as JPEG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(photo(number)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
