"""Samples straight from a checkpoint, with no recipe and no server."""

from collections.abc import Sequence

from dit.diffusion.config import EDMConfig
from dit.draw import open_checkpoint, preview
from dit.export import ModelCard
from dit.sample import SampleConfig
from flows.recipe import config_alone
from flows.tracking.progress import StageProgress
from flows.tracking.sink import StageTracker

COUNT = 16


def draw(
    checkpoint: str, overrides: Sequence[str], out: str, *, vae: str | None = None, heads: int | None = None
) -> list[str]:
    """Draw samples of any checkpoint into a folder; return the URLs of the picture and the npz.

    Args:
        checkpoint: what `dit.draw.open_checkpoint` opens.
        overrides: ``sample.steps=50`` and the like; without any, 16 images with the sampler that fits.
        out: the folder.
        vae: folder, URL or hub id of the autoencoder, where the checkpoint does not name it.
        heads: attention heads, where the checkpoint does not tell them.

    Raises:
        InputError: the checkpoint, an override or the folder is wrong; the line says what.
    """
    trained = open_checkpoint(checkpoint, vae=vae, heads=heads)
    config = _config(trained.card, overrides)
    with StageProgress("sample").shown() as progress:
        return preview(trained, config, out, StageTracker(None, progress.update))


def _config(card: ModelCard, overrides: Sequence[str]) -> SampleConfig:
    fitting = {"sampler": "heun", "steps": 18} if isinstance(card.diffusion, EDMConfig) else {}
    return config_alone(SampleConfig, "sample", {"count": COUNT, **fitting}, overrides)
