"""The description of a model version: its card, in Markdown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from shlex import quote
from typing import Any

from dit.export import CheckpointManifest
from dit.sample import SampleManifest
from flows.tracking.notes import counted, numbers
from storage.config import Config
from storage.header import short_digest
from storage.latents import VaeInfo
from storage.shards.shard import ShardManifest

LENGTH = 5000
"""The most characters that MLflow keeps of a description."""
_NAMED = 20  # classes


def card(
    name: str,
    version: int,
    samples: SampleManifest,
    checkpoint: CheckpointManifest,
    metrics: Mapping[str, float],
    conditions: Mapping[str, object],
    run_id: str,
) -> str:
    """What a model is, what it was made from and how, its numbers, and how to use it.

    Args:
        name: of the registered model.
        version: its number.
        samples: what was drawn with it.
        checkpoint: the model.
        metrics: of the version.
        conditions: under which they were measured, or the samples drawn.
        run_id: of the MLflow run that registers it, which has the picture.
    """
    about, latents = checkpoint.card, checkpoint.latents()
    shards, training = latents.parent("shards", ShardManifest), checkpoint.config
    archive = ", ".join(f"{split} `{short_digest(digest)}`" for split, digest in shards.inputs.items())
    of = f"latents of the autoencoder {_autoencoder(about.vae)}" if about.vae else "pixels"
    pixels = f"{about.resolution} x {about.resolution}"
    parts = [
        f"Draws images of {pixels} pixels, of {_classes(about.class_names)}. {_kind(about.model)} on {of}.",
        f"**Images:** {counted(shards.counts)}; archive {archive}.",
        f"**Training:** {counted(checkpoint.counts)}; {_kind(about.diffusion)}; {_settings(training)}.",
        f"**Numbers**\n\n{numbers(metrics)}" if metrics else "It has no metrics.",
        f"![Samples](get-artifact?path=samples.png&run_uuid={run_id})",
        _use(name, version, samples),
        f"**Conditions:** {', '.join(f'{key} {value}' for key, value in conditions.items())}.",
    ]
    return "\n\n".join(parts)[:LENGTH]


def _autoencoder(vae: VaeInfo) -> str:
    """Its name and the hash of its weights. Readers are on other machines, where a path of this one says nothing."""
    name = PurePath(vae.source).name if vae.source.startswith("/") else vae.source
    return f"`{name}` (weights `{short_digest(vae.sha256)}`)"


def _classes(names: Sequence[str]) -> str:
    some = ", ".join(names[:_NAMED])
    return f"{len(names)} classes ({some}{', ...' if len(names) > _NAMED else ''})" if len(names) > 1 else "one class"


def _kind(config: Config) -> str:
    """A config in words: its kind, and what it says otherwise."""
    values = dict(config.identity())
    return f"`{values.pop('kind')}` ({', '.join(f'{key} {value}' for key, value in values.items())})"


def _settings(training: Mapping[str, Any]) -> str:
    names = ("batch_size", "learning_rate", "ema_decay", "precision", "seed")
    return ", ".join(f"{name.replace('_', ' ')} {training[name]}" for name in names if training.get(name) is not None)


def _use(name: str, version: int, samples: SampleManifest) -> str:
    """How to load it in Python, and how to serve and ask it."""
    asked = json.dumps({"dataframe_split": {"columns": ["label"], "data": [[0]]}, "params": {"seed": 1}})
    where = f"models:/{name}/{version}"
    return f"""**Use**, with `MLFLOW_TRACKING_URI` set to the address of this server

```python
import base64, mlflow, pandas
model = mlflow.pyfunc.load_model({where!r})
images = model.predict(pandas.DataFrame({{"label": [0]}}), params={{"steps": {samples.config["steps"]}}})
png = base64.b64decode(images["png_base64"][0])
```

```
mlflow models serve -m {quote(where)} --env-manager local --port 8080
curl 127.0.0.1:8080/invocations -H "Content-Type: application/json" -d '{asked}'
```"""
