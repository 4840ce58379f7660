from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tiny
import torch

from dit.ranks import Ranks
from dit.training.data import Batches, open_data
from dit.training.draws import StepDraws
from storage.latents import LatentManifest, VaeInfo, latent_layout
from storage.manifest import StageOutput
from storage.order import coins, permutation, pooled
from storage.rows.store import RowWriter
from storage.rows.streaming import StreamedRows

N, CLASSES, BATCH, SEED, CHUNK = 50, 4, 8, 3, 8
SHAPE = (3, 2, 2)
VAE = VaeInfo(source="", sha256="", downsample=8, channels=3, scaling_factor=0.5, shift_factor=2.0)


def store(root: Path | str, std: float) -> LatentManifest:
    """Latents whose mean tells the item, and by a quarter more that it is mirrored."""
    out: StageOutput = tiny.output(root, LatentManifest, tiny.TRAINING)
    mean = np.arange(N)[:, None] + np.array([0, 0.25])
    arrays = {
        "mean": np.broadcast_to(mean[..., None, None, None], (N, 2, *SHAPE)).astype(np.float16),
        "std": np.full((N, 2, *SHAPE), std, np.float16),
        "label": (np.arange(N) % CLASSES).astype(np.int32),
        "source_index": np.arange(N),
    }
    writer = RowWriter(out, latent_layout(N, 2, SHAPE, 16, CHUNK), {})
    for block in writer.missing():
        start, stop = writer.bounds(block)
        writer.write(block, {name: values[start:stop] for name, values in arrays.items()})
    fields = {"resolution": 16, "split": "train", "flips": 2, "latent_shape": SHAPE}
    names = tuple(map(str, range(CLASSES)))
    return out.commit(LatentManifest, writer.finish(), counts={"images": N}, class_names=names, vae=VAE, **fields)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """Of latents without spread, so that x0 tells which item it is."""
    data = open_data(store(tmp_path_factory.mktemp("exact"), std=0))
    return Batches(data, SHAPE, BATCH, SEED, True, CLASSES, 0.0, Ranks(), torch.device("cpu"))


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    data = open_data(store(tmp_path_factory.mktemp("spread"), std=2))
    return Batches(data, SHAPE, BATCH, SEED, True, CLASSES, 0.0, Ranks(), torch.device("cpu"))


def stored(x0: torch.Tensor) -> np.ndarray:
    """What the store held, (B,), from scaled latents without spread."""
    values = (x0 / VAE.scaling_factor + VAE.shift_factor).flatten(1)
    assert torch.equal(values, values[:, :1].expand_as(values))
    return values[:, 0].numpy()


def items(batches: Batches, steps: range) -> np.ndarray:
    return np.concatenate([np.floor(stored(batches(step).x0)) for step in steps]).astype(int)


def test_epochs_are_permutations_one_after_the_other(batches: Batches) -> None:
    seen = items(batches, range(25))  # four epochs of 50, cut anyhow into batches of 8
    for epoch in range(4):
        part = seen[epoch * N : (epoch + 1) * N]
        assert sorted(part) == list(range(N))
        assert part.tolist() == permutation(SEED, epoch, N).tolist()


def test_a_batch_may_hold_several_epochs(batches: Batches) -> None:
    seen = items(replace(batches, batch_size=130), range(2))
    assert sorted(seen[:N]) == sorted(seen[N : 2 * N]) == list(range(N))
    assert seen.tolist() == items(batches, range(33))[:260].tolist()


def test_labels_go_with_their_images(batches: Batches) -> None:
    for step in range(8):
        batch = batches(step)
        assert batch.y is not None
        assert batch.y.dtype == torch.int64
        assert batch.y.tolist() == (np.floor(stored(batch.x0)) % CLASSES).tolist()


def test_any_step_can_be_made_again(spread: Batches) -> None:
    first = {step: spread(step) for step in (0, 7, 3, 400_000)}
    for step in (400_000, 3, 0, 7):
        again = spread(step)
        for name in ("x0", "noise", "u", "y"):
            assert torch.equal(getattr(again, name), getattr(first[step], name))
    assert not torch.equal(first[0].noise, first[3].noise)
    assert not torch.equal(first[0].noise, replace(spread, seed=SEED + 1)(0).noise)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_batch_of_one(spread: Batches, world_size: int) -> None:
    spread = replace(spread, label_dropout=0.5)
    for step in (0, 6):  # the second lies across two epochs
        whole = spread(step)
        parts = [replace(spread, ranks=Ranks(rank, world_size))(step) for rank in range(world_size)]
        for name in ("x0", "noise", "u", "y"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_posterior_is_drawn_then_shifted_and_scaled(spread: Batches, batches: Batches) -> None:
    drawn, centre = spread(5), batches(5)
    noise = StepDraws(SEED, 5, range(BATCH), SHAPE).posterior
    expected = centre.x0 + 2 * noise * VAE.scaling_factor
    torch.testing.assert_close(drawn.x0, expected, rtol=1e-6, atol=1e-5)
    assert drawn.x0.dtype == torch.float32
    place = int(stored(centre.x0)[0])
    mean = place + (0.25 if stored(centre.x0)[0] > place else 0)
    assert float(centre.x0[0, 0, 0, 0]) == pytest.approx((mean - 2.0) * 0.5)


def test_posterior_is_drawn_afresh_in_every_epoch(spread: Batches) -> None:
    spread = replace(spread, batch_size=N, flips=False)
    order = [np.argsort(permutation(SEED, epoch, N)) for epoch in (0, 1)]
    first, second = (spread(epoch).x0[order[epoch]] for epoch in (0, 1))
    assert (first != second).all()
    gap = (first - second) / VAE.scaling_factor / 2
    assert float(gap.std()) == pytest.approx(2**0.5, rel=0.1)
    assert float(gap.mean()) == pytest.approx(0, abs=0.2)


def test_flips_are_half_of_all_and_none_without(batches: Batches) -> None:
    def mirrored(batches: Batches) -> np.ndarray:
        return np.concatenate([stored(batches(step).x0) % 1 for step in range(10)]) == 0.25

    many = mirrored(replace(batches, batch_size=100))
    assert abs(many.mean() - 0.5) < 4 * 0.5 / len(many) ** 0.5
    assert not mirrored(replace(batches, flips=False)).any()


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_as_many_labels_are_dropped_as_asked(batches: Batches, dropout: float) -> None:
    dropping = replace(batches, batch_size=400, label_dropout=dropout)
    labels = [dropping(step).y for step in range(10)]
    dropped = torch.cat([y == CLASSES for y in labels if y is not None])
    assert len(dropped) == 4000
    tolerance = 4 * (dropout * (1 - dropout) / 4000) ** 0.5
    assert abs(float(dropped.float().mean()) - dropout) <= tolerance
    kept = torch.cat([y for y in labels if y is not None])[~dropped]
    assert set(kept.tolist()) == (set(range(CLASSES)) if dropout < 1 else set())


def test_an_unconditional_model_gets_no_labels(batches: Batches) -> None:
    assert replace(batches, num_classes=0)(0).y is None


def test_pooled_epochs_are_the_pooled_order_and_chunks_are_mirrored_as_one(batches: Batches) -> None:
    mixed = replace(batches, order="pooled")
    seen = np.concatenate([stored(mixed(step).x0) for step in range(25)])
    sides = []
    for epoch in range(4):
        part = seen[epoch * N : (epoch + 1) * N]
        order = pooled(SEED, epoch, N, CHUNK)
        assert np.floor(part).tolist() == order.tolist()
        tossed = coins(SEED, epoch, -(-N // CHUNK))
        assert np.array_equal(part % 1 == 0.25, tossed[order // CHUNK])
        sides += tossed.tolist()
    assert {True, False} == set(sides)
    assert not (stored(replace(mixed, flips=False)(0).x0) % 1).any()


@pytest.mark.parametrize("order", ["shuffled", "pooled"])
def test_the_stream_is_the_same_for_any_world_size_through_restarts(batches: Batches, order: str) -> None:
    """Each run is killed at random steps and goes on with another number of ranks that share its batch."""
    epochs = range(3)
    of_epoch = {"shuffled": permutation, "pooled": partial(pooled, chunk=CHUNK)}[order]
    expected = np.concatenate([of_epoch(SEED, epoch, N) for epoch in epochs])
    generator = np.random.default_rng(0)
    for first in range(1, 33):
        size, step, found, world_size = 3 * first, 0, list[np.ndarray](), first
        while step * size < len(expected):
            ranks = [
                replace(batches, order=order, batch_size=size, ranks=Ranks(rank, world_size), num_classes=0)
                for rank in range(world_size)
            ]
            stop = step + int(generator.integers(1, 2 + len(expected) // size))
            found += [stored(rank(step).x0) for step in range(step, stop) for rank in ranks]
            step = stop
            world_size = int(generator.choice([count for count in range(1, 33) if size % count == 0]))
        assert np.floor(np.concatenate(found))[: len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize("remote", [False, True])
def test_streamed_batches_are_those_of_a_local_store(
    tmp_path: Path, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("memory").store.clear()
    manifest = store("memory://root" if remote else tmp_path, std=2)
    local, streamed = (open_data(manifest, streamed=streamed) for streamed in (False, True))
    rest = (SHAPE, BATCH, SEED, True, CLASSES, 0.0, Ranks(), torch.device("cpu"))
    first, second = Batches(local, *rest, order="pooled"), Batches(streamed, *rest, order="pooled", streamed=True)
    asked: list[set[int]] = []
    take = StreamedRows._fetch

    def noted(rows: StreamedRows, chunks: Sequence[int]) -> Any:
        asked.append(set(chunks))
        return take(rows, chunks)

    monkeypatch.setattr(StreamedRows, "_fetch", noted)
    for step in [0, 1, 2, 30, 31, 5]:
        expected, found = first(step), second(step)
        assert torch.equal(found.x0, expected.x0)
        assert torch.equal(found.y, expected.y)
    assert max(map(len, asked)) > BATCH  # chunks of the pools ahead, not of the batch alone
