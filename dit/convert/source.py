"""Reads a DiT from checkpoints of others, or our own."""

from dataclasses import replace

from dit.convert import diffusers
from dit.convert.files import PICKLES, SAFETENSORS, read_tensors, suffix
from dit.convert.pretrained import LAYOUT, Pretrained, fitted, infer
from dit.diffusion.config import DiffusionConfig
from dit.export import MODEL, load
from dit.models.config import DiTConfig
from storage import uri
from storage.errors import InputError, StorageError, one_line

PIPELINE = "model_index.json"
TRANSFORMER = "transformer"
VAE = "vae"
KINDS = (
    f"name a {', '.join(PICKLES)} or {SAFETENSORS} file, a folder with {MODEL}, {diffusers.CONFIG} or {PIPELINE}, "
    "or hf://owner/name"
)


def read(source: str, *, heads: int | None = None) -> Pretrained:
    """A DiT from any known layout, by path or fsspec URL.

    Known are a file in the layout of the published checkpoints (.pt, bare or under "ema" or "model", or
    .safetensors); a folder of a diffusers DiTTransformer2DModel, or of a pipeline with one; and a folder of a
    model trained here.

    Args:
        source: the file or folder.
        heads: attention heads, if neither the source nor a published size of that width determines them.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it is not an adaLN-Zero DiT.
    """
    if suffix(source) in (*PICKLES, SAFETENSORS):
        tensors, where = read_tensors(source), uri.redact(source)
        config = infer(tensors, heads, where)
        return Pretrained(config, fitted(config, tensors, where), DiffusionConfig())
    pretrained = _folder(source)
    if heads not in (None, pretrained.config.heads):
        raise InputError(f"{uri.redact(source)}: has {pretrained.config.heads} heads, not {heads}; remove --heads")
    return pretrained


def _folder(source: str) -> Pretrained:
    try:
        names = uri.names(source)
    except InputError:
        raise
    except Exception as error:  # file systems promise no exception types
        raise InputError(f"{uri.redact(source)}: cannot be listed ({one_line(error)}); {KINDS}") from error
    if MODEL in names:
        return _ours(source)
    if PIPELINE in names:
        vae = uri.join(source, VAE) if VAE in names else None
        return replace(_folder(uri.join(source, TRANSFORMER)), vae=vae)
    if diffusers.CONFIG in names:
        return _diffusers(source, names)
    raise InputError(f"{uri.redact(source)}: not a checkpoint; {KINDS}")


def _ours(source: str) -> Pretrained:
    trained = load(source)
    config, card = trained.card.model, trained.card
    if not isinstance(config, DiTConfig) or config.block != "adaln_zero":
        raise InputError(f"{uri.redact(source)}: {MODEL} describes another model; {LAYOUT}")
    if not isinstance(card.diffusion, DiffusionConfig):
        raise InputError(f"{uri.redact(source)}: was trained with EDM's process, which these layouts do not have")
    return Pretrained(config, trained.model.state_dict(), card.diffusion, card.vae)


def _diffusers(source: str, names: list[str]) -> Pretrained:
    pickled = diffusers.WEIGHTS not in names and diffusers.PICKLED_WEIGHTS in names
    weights = diffusers.PICKLED_WEIGHTS if pickled else diffusers.WEIGHTS
    try:
        config = uri.read(uri.join(source, diffusers.CONFIG))
    except StorageError as error:
        raise InputError(str(error)) from error
    tensors = read_tensors(uri.join(source, weights))
    return Pretrained(*diffusers.from_diffusers(config, tensors, uri.redact(source)), DiffusionConfig())
