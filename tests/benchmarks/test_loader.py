"""The benchmark of the readers, in small."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader
from benchmarks.loader import RATIOS, Task, contest

TASK = Task(rows=640, shape=(2, 2, 2), batch_size=32, block_rows=64, chunk_rows=8, rounds=1, slow_batches=1)


def test_contest_in_small(tmp_path: Path) -> None:
    results, ratios = contest(TASK, tmp_path)
    values = {result.name: result.value for result in results}
    assert ratios.keys() == RATIOS.keys()
    for name, (ours, peer) in RATIOS.items():
        assert ratios[name] == pytest.approx(values[ours] / values[peer])
    assert values["gets_per_256"] == 256 / TASK.chunk_rows
    assert values["gets_per_256_moments"] == 2 * 256 / TASK.chunk_rows
    chunk = TASK.chunk_rows * TASK.row_bytes
    assert values["read_amplification"] == pytest.approx((chunk + 4) / chunk)
    assert values["gets_at_start"] == 4 * 10 + 5


def test_a_reader_of_other_latents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.np, "load", lambda _: np.zeros(TASK.shape, np.float16))
    with pytest.raises(ValueError, match="npy returns other latents"):
        contest(TASK, tmp_path)


def test_the_latents_of_an_output_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "Task", partial(Task, batch_size=32, block_rows=64, chunk_rows=8, rounds=1))
    made = np.random.default_rng(0).random((300, 3, 2, 2)).astype(np.float16)
    latents = loader.write(Task(rows=300, shape=(3, 2, 2), block_rows=64, chunk_rows=8), str(tmp_path), made)
    monkeypatch.setattr(loader, "contest", lambda task, _, latents: (task, latents))
    task, found = loader.measure(Path(latents.uri))
    assert (task.rows, task.shape) == (300, (3, 2, 2))
    assert np.array_equal(found, made)
