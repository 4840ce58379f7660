"""A grid of samples from the averaged weights during training, from the same noise each time."""

import logging
from collections.abc import Mapping
from functools import cached_property

import numpy as np
from torch import Tensor

from dit.devices import Arithmetic, device
from dit.export import ModelCard, Trained, rebuilt
from dit.sample import generate, open_decoder, picture
from dit.samplers.config import SampleConfig
from dit.samplers.guidance import UNGUIDED
from dit.samplers.table import QUICK
from dit.vae import Vae
from storage.errors import DitflowError

COUNT, STEPS, BATCH = 40, 25, 8
LOGGER = logging.getLogger(__name__)


class SampleGrid:
    """Draws samples with few steps of the deterministic sampler that fits the model's process.

    Args:
        card: what the model is made of.
        precision: arithmetic of model and decoder.
    """

    def __init__(self, card: ModelCard, precision: Arithmetic) -> None:
        self._card = card
        fields = {"labels": "balanced", "sampler": QUICK[card.diffusion.kind], "steps": STEPS, "precision": precision}
        if not card.model.label_dropout:
            fields["guidance_scale"] = UNGUIDED
        self._config = SampleConfig.model_validate(fields | {"count": COUNT, "batch_size": BATCH})

    @cached_property
    def _decoder(self) -> Vae | None:
        return open_decoder(self._config, self._card)

    def draw(self, weights: Mapping[str, Tensor]) -> bytes | None:
        """A PNG of samples from these weights; None, with a warning, if the decoder fails or they are not finite."""
        try:
            trained = Trained(rebuilt(self._card.model, weights).to(device()), self._card)
            parts = generate(self._config, trained, self._decoder, 0, COUNT)
            return picture(np.concatenate([part["image"] for part in parts]), self._card)
        except DitflowError as error:  # a missing picture must not end a run
            LOGGER.warning("train: no sample grid at this step: %s", error)
            return None
