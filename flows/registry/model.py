"""The registered model, as MLflow loads and serves it: class labels in, PNG images out."""

import base64
import json
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types.schema import ParamSchema
from numpy.typing import NDArray
from pydantic import ValidationError

import dit
from dit.devices import device
from dit.export import SAMPLING, weights_file
from dit.sample import check_process, draw
from dit.samplers.config import SampleConfig
from dit.samplers.guide import NAME as GUIDE
from dit.samplers.guide import with_guide
from dit.samplers.labels import class_label
from dit.vae import CONFIG, WEIGHTS, Vae, VaeRef, load_vae
from storage import uri
from storage.config import problem
from storage.errors import InputError, StorageError
from storage.images.grid import image_grid
from storage.manifest import OTHER_BYTES
from storage.seal import BrokenSealError, opened

PARAMS = frozenset({"seed", "steps", "guidance_scale", "guidance_channels", "sampler"})
"""What a request may set, as the signature of the registered model says."""
REGISTER_AGAIN = "run register again with --force"


class Generator(PythonModel):
    """Samples one image for each label."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the exported model, its guide and its autoencoder.

        Raises:
            DitflowError: a file is not what was registered.
        """
        if not hasattr(pyfunc._enforce_params_schema, "__wrapped__"):
            pyfunc._enforce_params_schema = _strict(pyfunc._enforce_params_schema)
        folder = Path(context.artifacts["model"])
        values = _opened(folder / SAMPLING)
        self._sampling = values["sampling"] | {"guide": context.artifacts.get(GUIDE)}
        trained = dit.load(str(folder), weights=weights_file(self._sampling["weights"]), device=device())
        self._trained = with_guide(SampleConfig.model_validate(self._sampling), trained, device())
        self._vae = _vae(context.artifacts["vae"], values["vae"]) if values["vae"] else None

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Sample images.

        Args:
            context: unused.
            model_input: column ``label``, class indices, or ``class``, class names. Row i is sample i of the seed.
            params: seed, steps, guidance_scale, guidance_channels, sampler. Defaults: those of the evaluation.

        Returns:
            Column ``png_base64``.

        Raises:
            MlflowException: there is no such class, or a param is wrong; a server answers with status 400.
        """
        try:
            pngs = [_base64(image) for image in self._images(self._labels(model_input), params or {})]
        except (InputError, ValidationError) as error:
            message = problem(error) if isinstance(error, ValidationError) else error
            raise MlflowException(str(message), INVALID_PARAMETER_VALUE) from error
        return pd.DataFrame({"png_base64": pngs})

    def _labels(self, asked: pd.DataFrame) -> torch.Tensor:
        names = self._trained.card.class_names
        if ("label" in asked) == ("class" in asked):
            raise InputError("pass either the column label or the column class")
        if "class" in asked:
            return torch.tensor([class_label(name, names) for name in asked["class"]])
        labels = torch.tensor(asked["label"].to_numpy())
        if not ((labels >= 0) & (labels < len(names))).all():
            raise InputError(f"label: must lie between 0 and {len(names) - 1}")
        return labels

    def _images(self, labels: torch.Tensor, params: dict[str, Any]) -> Iterator[NDArray[np.uint8]]:
        config = SampleConfig.model_validate(self._sampling | params | {"count": len(labels), "labels": "random"})
        check_process(config, self._trained.card)
        for start in range(0, len(labels), config.batch_size):
            indices = range(start, min(start + config.batch_size, len(labels)))
            yield from draw(config, self._trained, self._vae, indices, labels[indices.start : indices.stop])


def _strict(enforce: Callable[..., Any]) -> Callable[..., Any]:
    """MLflow's check of a request's params, which drops those that it does not know, refusing them for our models."""

    @wraps(enforce)
    def checked(params: Any, schema: ParamSchema | None) -> Any:
        ours = schema is not None and {spec.name for spec in schema.params} == PARAMS
        for name in sorted(set(params) - PARAMS) if ours and isinstance(params, dict) else ():
            near = "".join(f"; did you mean {known}?" for known in get_close_matches(name, PARAMS, n=1))
            message = f"{name}: no such param; there are {', '.join(sorted(PARAMS))}{near}"
            raise MlflowException(message, INVALID_PARAMETER_VALUE)
        return enforce(params, schema)

    return checked


def _opened(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(opened(path.read_bytes()))
    except BrokenSealError as error:
        raise StorageError(f"{path}: {OTHER_BYTES}; {REGISTER_AGAIN}") from error
    return values


def _vae(folder: str, hashes: dict[str, str]) -> Vae:
    config = Path(folder, CONFIG)
    if uri.file_sha256(str(config)) != hashes[CONFIG]:
        raise StorageError(f"{config}: {OTHER_BYTES}; {REGISTER_AGAIN}")
    return load_vae(VaeRef(source=folder, sha256=hashes[WEIGHTS]), device())


def _base64(image: NDArray[np.uint8]) -> str:
    return base64.b64encode(image_grid(image[None], columns=1)).decode()


set_model(Generator())
