"""Training that is killed, stopped, out of disk, fed with what is no number: the same bits or one line."""

import logging
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from safetensors.torch import load_file

from dit import train
from dit.export import CheckpointManifest
from dit.training.config import TrainConfig
from dit.training.data import Batch, Batches
from dit.vae import VaeRef
from storage import uri
from storage.errors import DitflowError, PreemptedError, StorageError
from storage.latents import LatentManifest
from storage.order import permutation
from storage.shards.shard import ShardManifest


@pytest.mark.parametrize(("when", "resumed_after"), [(3, 0), (4, 0), (5, 4), (7, 4), (11, 8)])
def test_an_interrupted_run_ends_in_the_same_bits(
    tmp_path: Path,
    latents: LatentManifest,
    whole: tuple[tiny.Recorder, CheckpointManifest],
    when: int,
    resumed_after: int,
) -> None:
    """Killed as a step is logged, which is before its checkpoint is written."""
    first, expected = whole
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(when))
    torch.rand(7)  # the state of torch's own generator does not matter
    recorder, manifest = tiny.through(tmp_path, tiny.TRAINING, latents)
    assert list(recorder.values) == list(range(resumed_after + 1, 13))
    assert recorder.values == {step: first.values[step] for step in recorder.values}
    assert tiny.objects(manifest) == tiny.objects(expected)


def test_a_run_may_be_killed_again_and_again(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    config = tiny.TRAINING.model_copy(update={"checkpoint_every": 1, "keep_checkpoints": 1})
    for when in (2, 3, 6, 9, 12):
        with pytest.raises(tiny.Killed):
            tiny.run_train(tmp_path, config, latents, tiny.Killer(when))
    assert tiny.objects(tiny.run_train(tmp_path, config, latents)) == tiny.objects(whole[1])


def test_a_broken_checkpoint_costs_time_but_no_bits(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(10))
    (state,) = tmp_path.rglob("step-000000008/state-00000-000.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    recorder, manifest = tiny.through(tmp_path, tiny.TRAINING, latents)
    assert min(recorder.values) == 5
    assert tiny.objects(manifest) == tiny.objects(whole[1])


class Preempter(tiny.Recorder):
    """Wants the machine back at a step."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.when = when

    def progress(self, done: int, total: int, unit: str) -> None:
        if done == self.when:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_goes(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match="stopped by SIGTERM at step 7; run the same command to continue"):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, Preempter(6))
    assert signal.getsignal(signal.SIGTERM) is before
    recorder, manifest = tiny.through(tmp_path, tiny.TRAINING, latents)
    assert min(recorder.values) == 8
    assert tiny.objects(manifest) == tiny.objects(whole[1])


def test_sigterm_at_the_last_step_comes_too_late(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    manifest = tiny.run_train(tmp_path, tiny.TRAINING, latents, Preempter(11))
    assert tiny.objects(manifest) == tiny.objects(whole[1])


class Filler(tiny.Recorder):
    """Fills the disk at a step: no file may be longer than this."""

    def progress(self, done: int, total: int, unit: str) -> None:
        if done == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(
    tmp_path: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            StorageError, match=r"step-000000008/state-00000-000.safetensors: the disk is full .* make room"
        ):
            tiny.run_train(tmp_path, tiny.TRAINING, latents, Filler())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.parent.name for path in tmp_path.rglob("record.json")] == ["step-000000004"]
    recorder, manifest = tiny.through(tmp_path, tiny.TRAINING, latents)
    assert min(recorder.values) == 5
    assert tiny.objects(manifest) == tiny.objects(whole[1])


DIVERGED = (
    "training diverged: 3 steps from step 2 on had no finite loss or gradient; the first of them used images "
    "{}, ... of the store; lower train.learning_rate, check these images, or set train.verify=every_start "
    "to see if bits flipped"
)


def test_a_loss_that_stays_without_a_number_ends_the_run_at_the_last_good_checkpoint(
    tmp_path: Path, latents: LatentManifest, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"learning_rate": 1e30, "log_every": 100, "checkpoint_every": 1, "max_skipped": 3, "batch_size": 9}
    config = tiny.TRAINING.model_copy(update=changes)
    with pytest.raises(DitflowError) as caught, caplog.at_level(logging.WARNING):
        tiny.run_train(tmp_path, config, latents)
    line = DIVERGED.format(", ".join(map(str, permutation(config.seed, 0, tiny.COUNT)[9:17])))
    assert str(caught.value) == line
    assert f"{line}; restarting from the last checkpoint" in caplog.messages
    (state,) = tmp_path.rglob("state-00000-000.safetensors")  # of the step before
    assert state.parent.name == "step-000000001"
    assert all(tensor.isfinite().all() for tensor in load_file(state).values())


class Faulty(Batches):
    """The batches of some steps are spoilt when they are made first, as by a fault of the machine."""

    spoilt: ClassVar[set[int]] = set()

    def __call__(self, step: int) -> Batch:
        batch = super().__call__(step)
        if step in self.spoilt:
            self.spoilt.discard(step)
            return replace(batch, x0=torch.full_like(batch.x0, torch.nan))
        return batch


def test_steps_that_are_not_finite_are_left_out(
    tmp_path: Path,
    latents: LatentManifest,
    whole: tuple[tiny.Recorder, CheckpointManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint that would be written in between is not, and a restart knows how many they were."""
    monkeypatch.setattr(train, "Batches", Faulty)
    monkeypatch.setattr(Faulty, "spoilt", {2})
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(6))
    Faulty.spoilt.update({6, 7})
    recorder = tiny.Recorder()
    manifest = tiny.run_train(tmp_path, tiny.TRAINING, latents, recorder)
    assert list(recorder.values) == list(range(5, 13))
    assert {step: values["skipped_steps"] for step, values in recorder.values.items()} == {
        5: 1, 6: 1, 7: 2, 8: 3, 9: 3, 10: 3, 11: 3, 12: 3,
    }  # fmt: skip
    assert "loss" not in recorder.values[7]
    assert recorder.values[9]["loss"] != whole[0].values[9]["loss"]
    assert manifest.counts["steps"] == 12
    saved = sorted(path.name for path in Path(manifest.uri, "checkpoints").iterdir())
    assert saved == ["step-000000004", "step-000000012"]


def test_a_fault_that_passes_costs_the_way_back_and_no_bits(
    tmp_path: Path,
    latents: LatentManifest,
    whole: tuple[tiny.Recorder, CheckpointManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "Batches", Faulty)
    monkeypatch.setattr(Faulty, "spoilt", {8, 9, 10})
    config = tiny.TRAINING.model_copy(update={"max_skipped": 3})
    assert tiny.objects(tiny.run_train(tmp_path, config, latents)) == tiny.objects(whole[1])


def test_damage_is_named_before_the_first_step(tmp_path: Path, shards: ShardManifest, vae: VaeRef) -> None:
    latents = tiny.run_encode(tmp_path, tiny.encode_config(vae), shards)
    path = Path(latents.uri, "data/std/c/0/1/0/0/0")
    data = path.read_bytes()
    path.write_bytes(data[:9] + b"?" + data[10:])
    recorder = tiny.Recorder()
    with pytest.raises(StorageError, match="data/std/c/0/1/0/0/0: does not hold the bytes that were committed"):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, recorder)
    assert not recorder.steps


def test_bits_that_flip_after_the_first_start_are_noticed_if_every_start_is_to_look(
    tmp_path: Path, shards: ShardManifest, vae: VaeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = tiny.run_encode(tmp_path, tiny.encode_config(vae), shards)
    monkeypatch.setattr(uri, "version", lambda url: {"size": "the same"})  # as on a disk whose bits flip
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(2))
    path = Path(latents.uri, "data/mean/c/0/0/0/0/0")
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])  # the last bit of a mantissa
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, tiny.TRAINING, latents, tiny.Killer(4))
    every = tiny.TRAINING.model_copy(update={"verify": "every_start"})
    with pytest.raises(StorageError, match="data/mean/c/0/0/0/0/0: does not hold the bytes that were .*") as caught:
        tiny.run_train(tmp_path, every, latents)
    assert "\n" not in str(caught.value)
    assert TrainConfig(verify="every_start").identity() == TrainConfig().identity()
