"""The benchmark of decoding, in small."""

import numpy as np
import pytest

from benchmarks.decode import contest
from benchmarks.photos import HEIGHT, WIDTH, jpeg, photo
from storage.images import transforms


def test_photos_have_the_spectrum_of_photographs() -> None:
    grey = photo(0).mean(2)
    power = np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    low, high = (power[(frequency > f / 1.2) & (frequency < f * 1.2)].mean() for f in (0.02, 0.08))
    assert 8 < low / high < 32  # amplitude as 1/f, power as 1/f^2: 16
    assert photo(0).shape == (HEIGHT, WIDTH, 3)
    assert not np.array_equal(photo(0), photo(1))


def test_contest_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [jpeg(number) for number in range(2)]
    results, ratios = contest(images, 64, 1)
    values = {result.name: result.value for result in results}
    assert ratios["decode_vs_reference"] == pytest.approx(values["ours"] / values["reference"])
    assert values["difference_mean"] <= values["difference_max"] <= 1
    monkeypatch.setattr(transforms, "load_fast", lambda data, size: transforms.load(data, size)[::-1])
    with pytest.raises(ValueError, match="differ from the reference"):
        contest(images, 64, 1)
