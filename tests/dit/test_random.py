import numpy as np
import pytest
from scipy import stats

from dit.random import Stream, normals, uniforms, words

MASK = 2**64 - 1
GOLDEN_UNIFORMS = [0.72317396444792, 0.4832980657093866, 0.7431531709287145]
GOLDEN_NORMALS = [0.80616945, -0.115646727, -0.8384341, 0.362772465, 0.624874413]


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds, from the paper."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(right >> 64) ^ c[1] ^ k0, right & MASK, (left >> 64) ^ c[3] ^ k1, left & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c


def test_the_reference_generator_gives_its_published_answer() -> None:
    answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64([0, 0, 0, 0], [0, 0]) == answer


@pytest.mark.parametrize(("seed", "step", "row"), [(0, 0, 0), (7, 400_000, 255), (MASK, 3, 2**40)])
def test_words_are_philox_with_row_and_step_in_the_counter(seed: int, step: int, row: int) -> None:
    expected = [word for block in (1, 2, 3) for word in philox4x64([block, row, step, 0], [seed, Stream.NOISE])]
    assert words(seed, Stream.NOISE, step, [row], 12)[0].tolist() == expected


def test_golden_values() -> None:
    """These are part of every result ever made: they must not change."""
    np.testing.assert_array_equal(uniforms(1, Stream.TIMESTEP, 2, [3], 3)[0], GOLDEN_UNIFORMS)
    np.testing.assert_array_equal(normals(1, Stream.NOISE, 2, [3], 5)[0], np.array(GOLDEN_NORMALS, np.float32))


def test_rows_do_not_depend_on_the_batch() -> None:
    whole = normals(5, Stream.NOISE, 9, range(64), 33)
    np.testing.assert_array_equal(whole[7:14], normals(5, Stream.NOISE, 9, range(7, 14), 33))
    np.testing.assert_array_equal(whole[[40, 3]], normals(5, Stream.NOISE, 9, [40, 3], 33))
    np.testing.assert_array_equal(whole[:, :10], normals(5, Stream.NOISE, 9, range(64), 10))


def test_seed_stream_step_and_row_all_matter() -> None:
    base = words(1, Stream.NOISE, 1, [1], 4)
    others = [
        words(2, Stream.NOISE, 1, [1], 4),
        words(1, Stream.POSTERIOR, 1, [1], 4),
        words(1, Stream.NOISE, 2, [1], 4),
        words(1, Stream.NOISE, 1, [2], 4),
    ]
    assert len({tuple(w[0]) for w in [base, *others]}) == 5
    assert not set(base[0]) & set(np.concatenate(others).ravel())


def test_uniforms_are_uniform() -> None:
    u = uniforms(3, Stream.TIMESTEP, 0, range(400), 500)
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.001


def test_normals_are_normal_and_independent() -> None:
    x = normals(3, Stream.NOISE, 0, range(400), 500)
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    n = x.size
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(stats.kurtosis(x.ravel())) < 4 * (24 / n) ** 0.5
    assert stats.kstest(x.ravel(), "norm").pvalue > 0.001
    assert abs((x[:, 0::2] * x[:, 1::2]).mean()) < 4 / (n / 2) ** 0.5  # the two from one word
    assert abs((x[1:] * x[:-1]).mean()) < 4 / n**0.5  # neighbouring rows


def test_odd_counts_and_no_rows() -> None:
    assert normals(0, Stream.NOISE, 0, range(3), 7).shape == (3, 7)
    assert normals(0, Stream.NOISE, 0, [], 7).shape == (0, 7)


def test_negative_seed_is_refused() -> None:
    with pytest.raises(OverflowError):
        words(-1, Stream.NOISE, 0, [0], 1)
