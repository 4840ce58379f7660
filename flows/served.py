"""The registered model, as MLflow loads and serves it: class labels in, PNG images out."""

import base64
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

import dit
from dit.devices import device
from dit.export import EMA_WEIGHTS, RAW_WEIGHTS
from dit.sample import SampleConfig, draw
from dit.vae import VaeRef, load_vae
from storage.errors import InputError
from storage.pictures import image_grid


class Generator(PythonModel):
    """Draws one image for every label asked for."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the exported model and its autoencoder."""
        folder = Path(context.artifacts["model"])
        weights = next(name for name in (EMA_WEIGHTS, RAW_WEIGHTS) if (folder / name).exists())
        self._trained = dit.load(str(folder), weights=weights, device=device())
        self._drawn = json.loads((folder / "sample.json").read_text())
        vae = context.artifacts.get("vae")
        self._vae = load_vae(VaeRef(source=vae), device()) if vae else None

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Images of labels.

        Args:
            context: unused.
            model_input: column ``label``, class numbers. Row i is sample i of the seed.
            params: seed, steps, guidance_scale, guidance_channels, sampler; all else is as it was evaluated.

        Returns:
            Column ``png_base64``.

        Raises:
            InputError: there is no such class.
        """
        labels = torch.tensor(model_input["label"].to_numpy())
        classes = len(self._trained.card.class_names)
        if not ((labels >= 0) & (labels < classes)).all():
            raise InputError(f"label: must lie between 0 and {classes - 1}")
        config = SampleConfig.model_validate(self._drawn | (params or {}) | {"count": len(labels)})
        pngs = []
        for start in range(0, len(labels), config.batch_size):
            indices = range(start, min(start + config.batch_size, len(labels)))
            images = draw(config, self._trained, self._vae, indices, labels[indices.start : indices.stop])
            pngs += [base64.b64encode(image_grid(image[None], columns=1)).decode() for image in images]
        return pd.DataFrame({"png_base64": pngs})


set_model(Generator())
