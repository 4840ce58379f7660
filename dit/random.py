"""Counter-based random numbers: they depend on their use and not on the process that draws them.

Every row (a sample, or a row of the global batch) reads its own part of the sequence of Philox4x64-10
(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): the key is (seed, stream),
the 256-bit counter holds (word, row, step). So a row is the same in any batch and on any rank, and
no two rows, steps or streams ever overlap. NumPy keeps the bits of Philox across versions but not
its distributions, so those are derived here.
"""

# R = rows, K = numbers in a row

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """What numbers are used for. The values are part of every result: add new ones, never change one."""

    TIMESTEP = 1
    NOISE = 2
    LABEL_DROP = 3
    POSTERIOR = 4
    FLIP = 5
    AUGMENT = 6
    DROPOUT = 7
    SAMPLE_INITIAL = 16
    SAMPLE_STEP = 17
    SAMPLE_LABEL = 18
    NOISE_IMAGE = 32
    FD_SUBSET = 33
    BOOTSTRAP = 34


def words(seed: int, stream: Stream, step: int, rows: Sequence[int], count: int) -> NDArray[np.uint64]:
    """Raw 64-bit words (R, K), every row from its own counter. All arguments lie in 0 .. 2**64 - 1."""
    out = np.empty((len(rows), count), np.uint64)
    key = np.array([seed, stream], np.uint64)
    for i, row in enumerate(rows):
        counter = np.array([0, row, step, 0], np.uint64)
        out[i] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return out


def uniforms(seed: int, stream: Stream, step: int, rows: Sequence[int], count: int) -> NDArray[np.float64]:
    """Uniform numbers (R, K) in [0, 1) with 53 bits.

    Examples:
        >>> both = uniforms(seed=0, stream=Stream.NOISE, step=7, rows=[3, 4], count=2)
        >>> bool((both[1] == uniforms(0, Stream.NOISE, 7, [4], 2)).all())  # a row is the same in any batch
        True
    """
    return (words(seed, stream, step, rows, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(seed: int, stream: Stream, step: int, rows: Sequence[int], count: int) -> NDArray[np.float32]:
    """Standard normal numbers (R, K) by Box and Muller (1958), two from each word, at most 6.77 in magnitude.

    Computed in float64 and rounded once, so that the last bit of a platform's logarithm, sine and
    cosine does not reach the result.
    """
    raw = words(seed, stream, step, rows, (count + 1) // 2)
    radius = np.sqrt(-2.0 * np.log(((raw >> np.uint64(32)) + 0.5) * 2.0**-32))
    angle = (raw & np.uint64(0xFFFFFFFF)) * (2.0 * np.pi * 2.0**-32)
    out = np.empty((len(rows), 2 * raw.shape[1]), np.float32)
    out[:, 0::2] = radius * np.cos(angle)
    out[:, 1::2] = radius * np.sin(angle)
    return out[:, :count]
