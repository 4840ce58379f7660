"""A store that is away for a while costs time and no bits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from s3_endpoint import BUCKET, Door, s3_server

from dit.encode import EncodeConfig
from dit.training.config import TrainConfig
from dit.vae import VaeRef
from storage import patience, uri
from storage.errors import StorageError
from storage.shards.shard import ShardManifest

ROOT = f"s3://{BUCKET}/runs"


class Shutter(tiny.Recorder):
    """Shuts a door each time some more work is done."""

    def __init__(self, door: Door) -> None:
        super().__init__()
        self.door = door

    def progress(self, done: int, total: int, unit: str) -> None:
        super().progress(done, total, unit)
        self.door.shut()


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    """The way to an S3 endpoint, whose client does not wait by itself."""
    with s3_server() as env, pytest.MonkeyPatch.context() as patch:
        door = Door(env["AWS_ENDPOINT_URL"])
        for name, value in (env | {"AWS_ENDPOINT_URL": door.address, "AWS_MAX_ATTEMPTS": "1"}).items():
            patch.setenv(name, value)
        patch.setattr("s3fs.S3FileSystem.retries", 1)
        yield door


@pytest.fixture
def waits(door: Door, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that are made before the shut door; each opens it."""
    made: list[float] = []

    def paused(seconds: float) -> bool:
        made.append(seconds)
        door.open()
        return True

    monkeypatch.setattr(patience, "_paused", paused)
    return made


@pytest.mark.full
def test_encoding_and_training_wait_for_their_store(
    tmp_path: Path, shards: ShardManifest, vae: VaeRef, door: Door, waits: list[float]
) -> None:
    encoding: EncodeConfig = tiny.encode_config(vae)
    streamed = {"reading": "streamed", "order": "pooled", "checkpoint_every": 1, "log_every": 1}
    training: TrainConfig = tiny.TRAINING.model_copy(update=streamed)
    latents = tiny.run_encode(tmp_path, encoding, shards)
    trained = tiny.run_train(tmp_path, training, latents)
    with patience.patient(500):
        latents_there = tiny.run_encode(ROOT, encoding, shards, Shutter(door))
        encoded = len(waits)
        assert encoded > 0
        trained_there = tiny.run_train(ROOT, training, latents_there, Shutter(door))
        assert len(waits) > encoded + 1
    assert tiny.objects(latents_there) == tiny.objects(latents)
    assert tiny.objects(trained_there) == tiny.objects(trained)


def test_without_patience_the_error_is_one_line(door: Door) -> None:
    door.shut()
    with pytest.raises(StorageError, match=f"{ROOT}/x: cannot be read .Could not connect") as caught:
        uri.read(f"{ROOT}/x")
    assert "\n" not in str(caught.value)
    door.open()
    with pytest.raises(StorageError, match=f"{ROOT}/x: no such object"):
        uri.read(f"{ROOT}/x")
