import numpy as np
import pytest
from scipy import stats

from dit.metrics.power_law import fit

GMAC = (0.36, 1.41, 6.06, 1.42, 5.56, 23.01, 5.01, 19.70, 80.71, 7.39, 29.05, 118.64)
FID = (153.60, 100.41, 68.40, 122.74, 68.38, 43.47, 118.87, 45.64, 23.33, 106.41, 43.01, 19.47)
"""The twelve sizes of DiT at 400K steps (arXiv 2212.09748, table 4)."""


def test_a_power_law_is_found() -> None:
    found = fit([1.0, 10.0, 100.0], [5.0, 0.5, 0.05])
    assert (found.coefficient, found.exponent, found.correlation) == pytest.approx((5, -1, -1))
    assert found.margin == pytest.approx(0, abs=1e-9)
    assert found(1000.0) == pytest.approx(0.005)


def test_it_is_the_regression_of_scipy() -> None:
    found, line = fit(GMAC, FID), stats.linregress(np.log(GMAC), np.log(FID))
    assert (found.exponent, found.coefficient) == pytest.approx((line.slope, np.exp(line.intercept)))
    assert found.margin == pytest.approx(stats.t.ppf(0.975, len(FID) - 2) * line.stderr)
    assert found.correlation == pytest.approx(line.rvalue)
    assert str(found) == "138 * x^-0.36 (exponent -0.46 to -0.27, 95 %), r -0.94, 12 runs"


def test_it_is_as_strong_as_the_paper_says() -> None:
    assert fit(GMAC, FID).correlation == pytest.approx(-0.93, abs=0.01)  # figure 8, of FID itself


def test_two_points_have_no_interval() -> None:
    found = fit([1.0, 2.0], [4.0, 2.0])
    assert found.margin is None
    assert str(found) == "4 * x^-1.00, r -1.00, 2 runs"


@pytest.mark.parametrize(("x", "y"), [([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0]), ([1.0], [1.0])])
def test_what_no_line_goes_through(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two different x"):
        fit(x, y)
