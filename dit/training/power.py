"""Power-function averages of weights, and their combination to one of any width afterwards (EDM2).

After step t = 1, 2, ... the average with exponent g > 0 has

    m_t = b_t m_{t-1} + (1 - b_t) w_t,    b_t = (1 - 1/t)^(g + 1)

so the weights of step s count about p(s) = (g + 1) s^g / t^(g + 1), a profile that stretches with the run. Its
standard deviation as a share of t is its relative width (Karras et al., arXiv 2312.02696, section 3.1):

    width^2 = (g + 1) / ((g + 2)^2 (g + 3))

Profiles of other widths are combined from those that a run has tracked (section 3.2). The least-squares coefficients x
of the profiles p_i for the profile q solve A x = c with A_ij = <p_i, p_j> and c_i = <p_i, q>; see `inner_product`.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_WIDTH: Final = 12**-0.5
"""Width of g = 0, which counts all steps equally."""


class Profile(NamedTuple):
    """How much the steps count in a power-function average."""

    step: float
    """The last step, counted from 1."""
    exponent: float
    """The exponent g."""


def exponent(width: float) -> float:
    """The exponent g of a relative width in 0 .. `MAX_WIDTH`, the largest real root of the equation above.

    Examples:
        >>> round(exponent(0.05), 2), round(width(16.97), 3)
        (16.97, 0.05)
    """
    inverse = width**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6 * abs(root)))


def width(exponent: float) -> float:
    """The relative width of an exponent g."""
    return float(np.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))))


def decay(exponent: float, step: int) -> float:
    """The decay b_t of step t, counted from 1."""
    return float((1 - 1 / step) ** (exponent + 1))


def inner_product(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles over all steps, in closed form.

    Up to the earlier last step a, the later one being b, the integrand is a power of s with exponent g_a + g_b. With
    r = a / b the integral is (g_a + 1) (g_b + 1) r^g_b / ((g_a + g_b + 1) b).
    """
    first, last = sorted((one, other))
    ratio: float = (first.step / last.step) ** last.exponent
    product = (first.exponent + 1) * (last.exponent + 1)
    return product * ratio / ((first.exponent + last.exponent + 1) * last.step)


def combination(profiles: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """The coefficients with which averages are added up for another profile, scaled to sum 1; and the error.

    Returns:
        The coefficients, one for each profile; and the distance between the sum of the profiles and the wanted one, as
        a share of the norm of the wanted one.
    """
    gram = np.array([[inner_product(one, other) for other in profiles] for one in profiles])
    target = np.array([inner_product(one, wanted) for one in profiles])
    found = np.linalg.solve(gram, target)
    found /= found.sum()
    norm = inner_product(wanted, wanted)
    square = norm - 2 * found @ target + found @ gram @ found
    return found, float(np.sqrt(max(square, 0.0) / norm))
