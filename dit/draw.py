"""Samples of any model or checkpoint: in memory, or written to a picture and an npz file."""

from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from dit.convert import Hints, Pretrained, described, read
from dit.devices import device
from dit.export import MODEL, ModelCard, Trained, load
from dit.metrics import npz
from dit.sample import compiled, generate, open_decoder, picture
from dit.samplers.config import SampleConfig
from dit.samplers.guide import with_guide
from dit.vae import VaeRef, info
from storage import uri
from storage.errors import InputError
from storage.latents import VaeInfo
from storage.rows.store import gathered
from storage.tracker import NullTracker, Tracker

PICTURE = "samples.png"
ARRAYS = "samples.npz"


def open_checkpoint(source: str, *, vae: str | None = None, **hints: Unpack[Hints]) -> Trained:
    """A model trained here or elsewhere, ready to sample from.

    Args:
        source: a folder of a trained model, or whatever `dit.convert.read` reads.
        vae: folder, URL or hub id of the autoencoder, if the checkpoint does not name it.
        hints: what the source does not record.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or its autoencoder is not known; or it was trained
            here, and records what is said of it.
    """
    if uri.exists(uri.join(source, MODEL)):
        if told := next((name for name, value in {"vae": vae, **hints}.items() if value is not None), None):
            hint = "; sample.vae.source names another decoder" if told == "vae" else ""
            where = uri.redact(source)
            raise InputError(f"{where}: was trained here and records this; remove --{told.replace('_', '-')}{hint}")
        return load(source, device=device())
    pretrained = read(source, **hints)
    autoencoder = vae or pretrained.vae
    if autoencoder is None:
        hint = "pass --vae, for the published models stabilityai/sd-vae-ft-ema"
        raise InputError(f"{uri.redact(source)}: the checkpoint does not name its autoencoder; {hint}")
    card = _card(pretrained, info(VaeRef(source=autoencoder)))
    return Trained(pretrained.build(device()), card, tuple(described(pretrained)))


def draw_samples(
    trained: Trained,
    config: SampleConfig,
    tracker: Tracker = NullTracker(),  # noqa: B008  it has no state
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Draw samples of a model into memory.

    Args:
        trained: the model.
        config: how to draw them, and how many.
        tracker: receives the progress.

    Returns:
        The images uint8 (count, H, H, 3) and their labels (count,), -1 of a model without classes.

    Raises:
        InputError: the config does not fit the model, or its decoder cannot be loaded.
        DitflowError: the samples are not finite.

    Examples:
        >>> from dit.fit import Training
        >>> from dit.training.config import TrainConfig
        >>> model = {"kind": "dit", "size": {"depth": 1, "width": 16, "heads": 2}}
        >>> config = TrainConfig(model=model, diffusion={"kind": "flow"}, steps=1, batch_size=2)
        >>> training = Training(config, np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]))
        >>> for _ in training:
        ...     pass
        >>> sampling = SampleConfig(count=4, labels="balanced", sampler="euler", steps=2)
        >>> images, labels = draw_samples(training.trained(), sampling)
        >>> images.shape, images.dtype, labels.tolist()
        ((4, 8, 8, 3), dtype('uint8'), [0, 1, 0, 1])
    """
    vae = open_decoder(config, trained.card)
    trained = with_guide(config, trained, device())
    parts = generate(config, compiled(config, trained), vae, 0, config.count)
    rows = gathered(parts, tracker, start=0, total=config.count, unit="images")
    return rows["image"], rows["label"]


def preview(trained: Trained, config: SampleConfig, out: str, tracker: Tracker) -> list[str]:
    """Draw samples into a folder: ``samples.png``, and ``samples.npz`` with images and labels as ADM writes them.

    Returns:
        The URLs of both.

    Raises:
        InputError: the folder has samples already, or the config does not fit the model.
    """
    urls = [uri.join(out, name) for name in (PICTURE, ARRAYS)]
    for url in urls:
        if uri.exists(url):
            raise InputError(f"--out: {uri.redact(out)} has samples already; name another folder")
    images, labels = draw_samples(trained, config, tracker)
    uri.write(urls[0], picture(images, trained.card))
    npz.write(urls[1], iter([images]), labels.astype(np.int64), trained.card.resolution)
    return urls


def _card(pretrained: Pretrained, vae: VaeInfo) -> ModelCard:
    config = pretrained.config
    return ModelCard(
        model=config,
        diffusion=pretrained.diffusion,
        vae=vae,
        channels=pretrained.channels,
        resolution=config.input_size * vae.downsample,
        class_names=pretrained.class_names or tuple(map(str, range(config.num_classes))),
        steps=0,
    )
