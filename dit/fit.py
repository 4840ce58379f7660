"""Training on images in memory: no store, no files, no server."""

# N = images, B = batch, H = image side

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit.devices import arithmetic, device
from dit.diffusion.build import build_process
from dit.export import Trained, WeightsName, rebuilt, weights_file
from dit.ranks import Ranks
from dit.train import batches_of, card_for, weights_of
from dit.training.config import TrainConfig
from dit.training.data import Pixels
from dit.training.loop import StepResult, train
from dit.training.start import initial_state, step_config
from storage.config import Config
from storage.errors import InputError
from storage.latents import LatentManifest
from storage.manifest import stage_output

ALONE = Ranks()


class Training:
    """The training of a model on images in memory, in this process. To iterate over it is to take its steps.

    The steps are those of the stage: the same config and images give the same bits. What stores, checkpoints, logs
    and several ranks need is not used (``steps`` is).

    Args:
        config: settings of the training.
        images: uint8 (N, H, H, 3).
        labels: int (N,), indices of the class names.
        class_names: names of the classes. Default: the numbers from 0 to the largest label.

    Raises:
        InputError: the images or labels are not of these shapes and types, or the model does not fit the images.

    Examples:
        >>> import numpy as np
        >>> from dit.training.config import TrainConfig
        >>> images = np.zeros((6, 8, 8, 3), np.uint8)
        >>> model = {"kind": "dit", "size": {"depth": 1, "width": 16, "heads": 2}}
        >>> config = TrainConfig(model=model, diffusion={"kind": "flow"}, steps=2, batch_size=4, ema_decay=0.5)
        >>> training = Training(config, images, np.array([0, 0, 1, 1, 2, 2]), ["red", "green", "blue"])
        >>> [step.step for step in training]
        [1, 2]
        >>> training.trained().card.class_names
        ('red', 'green', 'blue')
    """

    def __init__(
        self,
        config: TrainConfig,
        images: NDArray[np.uint8],
        labels: NDArray[np.integer[Any]],
        class_names: Sequence[str] = (),
    ) -> None:
        names = tuple(class_names or map(str, range(int(labels.max(initial=0)) + 1)))
        _check(images, labels, names)
        facts = _facts(images, names)
        pixels = Pixels(_Arrays({"image": images, "label": labels.astype(np.int32)}))
        self.config = config
        self.card = card_for(config, facts)
        self._batches = batches_of(config, self.card, facts, ALONE, pixels)
        self.state = initial_state(config, self.card, ALONE)

    def __iter__(self) -> Iterator[StepResult]:
        process, how = build_process(self.config.diffusion, device()), step_config(self.config)
        with arithmetic(self.config.precision):
            yield from train(self.state, process, self._batches, how, stop=self.config.steps, ranks=ALONE)

    def trained(self, weights: WeightsName = "ema") -> Trained:
        """A copy of the model after the steps taken so far, ready to sample from.

        Args:
            weights: which weights: the average ``ema``, ``raw``, or a further average that the config asks for.

        Raises:
            KeyError: there are no such weights.
        """
        tensors = weights_of(self.state, self.config.lora, ALONE)[weights_file(weights)]
        card = self.card.model_copy(update={"steps": self.state.step})
        return Trained(rebuilt(card.model, tensors).to(device()), card)


@dataclass(frozen=True)
class _Arrays:
    """Arrays in memory as `dit.training.data.Rows`."""

    arrays: Mapping[str, NDArray[Any]]

    def array(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def chunk_rows(self, name: str) -> int:
        return 1

    def take(self, name: str, indices: NDArray[np.int64], axis0: NDArray[np.int64] | None = None) -> NDArray[Any]:
        return self.arrays[name][indices]

    def expect(self, name: str, indices: NDArray[np.int64], axis0: NDArray[np.int64] | None = None) -> None:
        pass


def _check(images: NDArray[Any], labels: NDArray[Any], names: tuple[str, ...]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (images.shape[1], images.shape[1], 3):
        raise InputError(f"images: must be uint8 (N, H, H, 3), not {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise InputError(f"labels: must be integers ({len(images)},), one an image, not {labels.dtype} {labels.shape}")
    if not len(images) or labels.min() < 0 or labels.max() >= len(names):
        raise InputError(f"labels: must be from 0 to {len(names) - 1}, one of the {len(names)} classes")


def _facts(images: NDArray[np.uint8], names: tuple[str, ...]) -> LatentManifest:
    """What the training stage reads in the manifest of a store of pixels, which is written nowhere."""
    side = images.shape[1]
    return stage_output("memory://images", LatentManifest.STAGE, 0, Config(), parents={}, inputs={}).manifest(
        LatentManifest,
        counts={"images": len(images)},
        resolution=side,
        split="train",
        flips=1,
        latent_shape=(3, side, side),
        class_names=names,
        vae=None,
    )
