"""Writes a DiT or a latent DiffiT in the layouts of other tools."""

import io
import json
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from dit import vae as autoencoder
from dit.convert import diffusers
from dit.convert.files import SAFETENSORS, suffix
from dit.convert.layout import published, tables
from dit.convert.pretrained import Pretrained, described, with_null_label
from dit.convert.record import KEY, Record
from dit.convert.source import PIPELINE, TRANSFORMER
from dit.diffusion.config import DiffusionConfig
from dit.vae import VaeRef
from storage import uri
from storage.errors import InputError

Layout = Literal["reference", "diffusers", "pipeline"]

PIPELINE_MODULE: Final = "pipeline"
PIPELINE_CLASS: Final = "GuidedDiTPipeline"
PIPELINE_VAE: Final = "AutoencoderKL"


def write(model: Pretrained, destination: str, layout: Layout, *, vae: str | None = None) -> None:
    """Write a model to a new file or folder, by path or fsspec URL.

    Args:
        model: the model to write.
        destination: for "reference" a .safetensors or .pt file with the weights in the layout of the published
            checkpoints of its kind, and a record in the metadata of the former; for "diffusers" a folder of a
            DiTTransformer2DModel; for "pipeline" one of a whole diffusers pipeline that samples with a module of its
            own.
        layout: which of the three.
        vae: folder, URL or hub id of the autoencoder to put into the pipeline's folder, if not the model's own.
            Without it the model must name one.

    Raises:
        InputError: the destination exists, the layout has no such model, or the autoencoder is unknown or does not fit.
        StorageError: the disk is full or the store refuses.
    """
    if uri.exists(destination):
        raise InputError(f"{uri.redact(destination)}: exists already; name another destination")
    if vae is not None and layout != "pipeline":
        raise InputError("--vae: only a pipeline has an autoencoder; write --to pipeline or remove it")
    if model.channels and (layout != "reference" or suffix(destination) != SAFETENSORS):
        text = "its latents are normalised channel by channel, which only --to reference records"
        raise InputError(f"{uri.redact(destination)}: {text}, in a {SAFETENSORS} file; sample from it here")
    state = with_null_label(model)
    if layout == "reference":
        theirs = tables(model.config) | {published(name): tensor for name, tensor in state.items()}
        uri.write(destination, _file(theirs, model, destination))
    elif not isinstance(model.diffusion, DiffusionConfig):
        raise InputError(f"--to: diffusers has no DiT of the process {model.diffusion.kind}; use --to reference")
    else:
        config, weights = diffusers.to_diffusers(model.config, state)
        objects = {diffusers.WEIGHTS: _safetensors(weights), diffusers.CONFIG: _json(config)}
        if layout == "pipeline":
            ref = _own_autoencoder(model, destination) if vae is None else VaeRef(source=vae)
            objects = {f"{TRANSFORMER}/{name}": data for name, data in objects.items()} | _pipeline_files(model, ref)
        for name, data in objects.items():
            uri.write(uri.join(destination, name), data)


def summary(model: Pretrained, destination: str, layout: Layout) -> str:
    """What was read and assumed, where it was written, and for a pipeline how to load it."""
    url = uri.redact(destination)
    lines = [*described(model), f"written to {url}"]
    if layout == "pipeline":
        lines.append(f"load it with DiffusionPipeline.from_pretrained({url!r}, trust_remote_code=True)")
    return "\n".join(lines)


def _file(state: dict[str, Tensor], model: Pretrained, destination: str) -> bytes:
    if suffix(destination) == SAFETENSORS:
        record = Record(process=model.diffusion, class_names=model.class_names, channels=model.channels)
        return _safetensors(state, {KEY: record.model_dump_json()})
    if suffix(destination) != ".pt":
        raise InputError(f"{uri.redact(destination)}: a reference checkpoint ends in {SAFETENSORS} or .pt; rename it")
    buffer = io.BytesIO()
    torch.save(_alone(state), buffer)
    return buffer.getvalue()


def _own_autoencoder(model: Pretrained, destination: str) -> VaeRef:
    """The autoencoder that comes with a model, or that its card names."""
    if model.vae is not None:
        return VaeRef(source=model.vae)
    if model.scales is not None:
        return VaeRef(source=model.scales.source, sha256=model.scales.sha256)
    raise InputError(f"{uri.redact(destination)}: the checkpoint does not name its autoencoder; pass --vae")


def _pipeline_files(model: Pretrained, vae: VaeRef) -> dict[str, bytes]:
    """The files of a pipeline besides the transformer. Its index, which makes it a pipeline, comes last."""
    objects = _autoencoder(model, vae)
    index = diffusers.component(
        [PIPELINE_MODULE, PIPELINE_CLASS],
        transformer=["diffusers", "DiTTransformer2DModel"],
        scheduler=["diffusers", "DDPMScheduler"],
        vae=["diffusers", PIPELINE_VAE],
    )
    code = files(__package__).joinpath("diffusers_pipeline.py").read_bytes()
    objects |= {diffusers.SCHEDULER: _json(_scheduler(model)), f"{PIPELINE_MODULE}.py": code}
    return objects | {PIPELINE: _json(index)}


def _scheduler(model: Pretrained) -> dict[str, Any]:
    assert isinstance(model.diffusion, DiffusionConfig)
    return diffusers.component(
        "DDPMScheduler",
        num_train_timesteps=model.diffusion.steps,
        beta_schedule=model.diffusion.schedule,
        beta_start=model.diffusion.beta_start,
        beta_end=model.diffusion.beta_end,
        variance_type="learned_range" if model.config.learn_variance else "fixed_small",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def _autoencoder(model: Pretrained, ref: VaeRef) -> dict[str, bytes]:
    """The two files of the autoencoder, with the scaling of the latents that the model was trained on."""
    info = autoencoder.info(ref)
    if info.channels != model.config.in_channels:
        channels = f"{info.channels} latent channels, the model {model.config.in_channels}"
        raise InputError(f"{uri.redact(ref.source)}: the autoencoder has {channels}; use the one of its latents")
    scales = model.scales or info
    with tempfile.TemporaryDirectory() as folder:
        autoencoder.fetch(ref, Path(folder))
        config = json.loads(Path(folder, autoencoder.CONFIG).read_bytes())
        weights = Path(folder, autoencoder.WEIGHTS).read_bytes()
    if config["_class_name"] != PIPELINE_VAE:
        other = f"is an {config['_class_name']}, and this pipeline decodes with an {PIPELINE_VAE}"
        raise InputError(f"{uri.redact(ref.source)}: {other}; write --to diffusers or --to reference")
    config |= {"scaling_factor": scales.scaling_factor, "shift_factor": scales.shift_factor}
    return {f"vae/{autoencoder.CONFIG}": _json(config), f"vae/{autoencoder.WEIGHTS}": weights}


def _safetensors(tensors: dict[str, Tensor], metadata: Mapping[str, str] = {}) -> bytes:
    data: bytes = save_tensors(_alone(tensors), {"format": "pt", **metadata})  # some readers ask for the format
    return data


def _alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as safetensors demands; torch would save all that a view is part of."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()
