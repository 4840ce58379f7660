"""Training in memory takes the steps of the stage, and what it made can be sampled and measured."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import tiny
import torch
from beginning import weights

from dit.compare import compare_arrays, compare_images
from dit.diffusion.config import FlowConfig
from dit.draw import draw_samples
from dit.evaluate import EvaluateConfig
from dit.fit import Training
from dit.metrics.extractors.load import ExtractorRef, load_extractor
from dit.metrics.npz import write
from dit.samplers.config import SampleConfig
from dit.training.config import TrainConfig
from flows.demo import CLASSIFIER
from storage.errors import InputError
from storage.rows.store import RowReader
from storage.tracker import NullTracker

CONFIG = TrainConfig(
    model=tiny.MODEL, diffusion=FlowConfig(), steps=6, batch_size=8, ema_decay=0.5, ema_decays=(0.9,), log_every=1
)
SAMPLING = SampleConfig(count=7, labels="balanced", sampler="euler", steps=2)


def made_up(root: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    store = synthetic.pixels(root)
    rows = RowReader(store)
    return store, rows.array("image"), rows.array("label")


@pytest.mark.parametrize("flips", [True, False])
def test_the_steps_are_those_of_the_stage(flips: bool, tmp_path: Path) -> None:
    config = CONFIG.changed(flips=flips)
    store, images, labels = made_up(tmp_path)
    told, checkpoint = tiny.through(tmp_path, config, store)
    training = Training(config, images, labels, synthetic.CLASSES)
    assert [step.loss for step in training] == [told.values[step]["loss"] for step in range(1, 7)]
    for name, file in (("ema", "model"), ("raw", "model-raw"), ("ema-0.9", "model-ema-0.9")):
        kept = weights(checkpoint, f"{file}.safetensors")
        assert all(torch.equal(kept[key], tensor) for key, tensor in training.trained(name).model.state_dict().items())
    card = training.trained().card
    assert card == checkpoint.card.model_copy(update={"weights": {}})


def test_labels_are_of_any_integer_type(tmp_path: Path) -> None:
    _, images, labels = made_up(tmp_path)
    training = Training(CONFIG, images, labels.astype(np.uint8))
    assert training.card.class_names == tuple(map(str, range(labels.max() + 1)))


def test_training_stops_and_goes_on(tmp_path: Path) -> None:
    _, images, labels = made_up(tmp_path)
    training, whole = (Training(CONFIG, images, labels) for _ in range(2))
    assert [step.step for step in islice(training, 2)] == [1, 2]
    half = training.trained()
    assert half.card.steps == 2
    before = [tensor.clone() for tensor in half.model.state_dict().values()]
    assert [step.step for step in training] == [3, 4, 5, 6]
    list(whole)
    mine, other = (each.trained("raw").model.state_dict() for each in (training, whole))
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    after = half.model.state_dict().values()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))  # a copy
    with pytest.raises(KeyError):
        training.trained("ema-0.5")


def test_samples_in_memory_are_measured_as_those_in_files(tmp_path: Path) -> None:
    _, images, labels = made_up(tmp_path)
    training = Training(CONFIG, images, labels)
    list(training)
    samples, classes = draw_samples(training.trained(), SAMPLING)
    assert samples.shape == (7, 16, 16, 3)
    assert classes.tolist() == [0, 1, 2, 0, 1, 2, 0]
    for name, arrays in (("samples", samples), ("reference", images)):
        write(str(tmp_path / f"{name}.npz"), iter([arrays]), np.zeros(len(arrays), np.int64), 16)
    judge = ExtractorRef(name="demo-digits", weights=str(CLASSIFIER))
    in_files = compare_images(
        str(tmp_path / "samples.npz"),
        str(tmp_path / "reference.npz"),
        EvaluateConfig(extractor=judge, batch_size=5),
        root=str(tmp_path),
        tracker=NullTracker(),
    )
    in_memory = compare_arrays(samples, images, load_extractor(judge), batch_size=5)
    assert in_memory == pytest.approx(in_files.metrics, rel=1e-6)  # sums in another order
    with pytest.raises(InputError, match="at least 4 reference images and samples, not 24 and 3"):
        compare_arrays(samples[:3], images, load_extractor(judge))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": np.zeros((4, 16, 16), np.uint8)},
            r"^images: must be uint8 \(N, H, H, 3\), not uint8 \(4, ",
        ),
        ({"images": np.zeros((4, 16, 8, 3), np.uint8)}, "^images: must be uint8"),
        ({"images": np.zeros((4, 16, 16, 3), np.float32)}, "^images: must be uint8"),
        ({"labels": np.zeros(3, np.int64)}, r"^labels: must be integers \(4,\)"),
        ({"labels": np.zeros(4)}, "^labels: must be integers"),
        ({"labels": np.array([0, 1, 2, -1])}, "^labels: must be from 0 to 2"),
        ({"class_names": ["a", "b"]}, "^labels: must be from 0 to 1, one of the 2 classes"),
        ({"images": np.zeros((0, 16, 16, 3), np.uint8), "labels": np.zeros(0, np.int64)}, "^labels: "),
        ({"images": np.zeros((4, 15, 15, 3), np.uint8)}, "^train.model: does not fit the latents: input_size 15"),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict[str, Any], message: str) -> None:
    given = {"images": np.zeros((4, 16, 16, 3), np.uint8), "labels": np.arange(4) % 3} | change
    with pytest.raises(InputError, match=message):
        Training(CONFIG, **given)
