"""Reads a DiT or a latent DiffiT from checkpoints of others, or our own."""

from dataclasses import replace
from typing import Unpack

from dit.convert import diffusers
from dit.convert.files import PICKLES, SAFETENSORS, Content, read_content, suffix
from dit.convert.flow import reversed_time, without_variance
from dit.convert.layout import AnyConfig, of_repa
from dit.convert.network import network, unread_average
from dit.convert.pretrained import LAYOUT, Hints, Pretrained, completed, fitted, infer
from dit.convert.process import Told, check_told, process
from dit.convert.record import check_count, check_scale, recorded, told_names, told_statistics
from dit.diffusion.config import EDMConfig, FlowConfig
from dit.export import MODEL, load
from dit.models.config import DiffiTConfig, DiTConfig
from dit.weights import DIFFUSERS_WEIGHTS
from storage import uri
from storage.errors import InputError, StorageError, one_line

PIPELINE = "model_index.json"
TRANSFORMER = "transformer"
VAE = "vae"
KINDS = (
    f"name a {', '.join(PICKLES)} or {SAFETENSORS} file, a folder with {MODEL}, {diffusers.CONFIG} or {PIPELINE}, "
    "or hf://owner/name"
)
SHARDED = {
    ".metadata": "torch.distributed.checkpoint; python -m torch.distributed.checkpoint.format_utils dcp_to_torch",
    "zero_to_fp32.py": "DeepSpeed; python zero_to_fp32.py",
}
"""Files that show what wrote a folder of shards, and the command that makes one file of it."""


def read(source: str, **hints: Unpack[Hints]) -> Pretrained:
    """A DiT or a latent DiffiT from any known layout, by path or fsspec URL.

    Known are a file in the layout of the published checkpoints (safetensors or a pickle, with the weights at any
    place in it); a folder of a diffusers DiTTransformer2DModel, or of a pipeline with one; and a folder of a model
    trained here.

    Args:
        source: the file or folder.
        hints: what the source does not record.

    Raises:
        InputError: there is no such checkpoint, it is damaged, it is neither an adaLN-Zero DiT nor a latent DiffiT, its
            process is not known, or it contradicts the hints.
    """
    if suffix(source) in (*PICKLES, SAFETENSORS):
        return _told(_file(source, hints), hints, uri.redact(source))
    pretrained = _told(_folder(source, hints), hints, uri.redact(source))
    config = pretrained.config
    for name, value, told in (
        ("heads", config.heads, hints.get("heads")),
        ("classes", config.num_classes, hints.get("classes")),
        ("latent-size", config.input_size, hints.get("latent_size")),
    ):
        if told not in (None, value):
            raise InputError(f"{uri.redact(source)}: has {name} {value}, not {told}; remove --{name}")
    return pretrained


def _told(found: Pretrained, hints: Hints, where: str) -> Pretrained:
    """The same model with what the user says of its classes and latents."""
    names, statistics = hints.get("class_names"), hints.get("latent_statistics")
    if names is not None and found.class_names is not None:
        raise InputError(f"{where}: has the names of its classes; remove --class-names")
    if statistics is not None and found.channels is not None:
        raise InputError(f"{where}: has the statistics of its latents; remove --latent-statistics")
    if names is not None:
        found = replace(found, class_names=told_names(names))
    if statistics is not None:
        found = replace(found, channels=told_statistics(statistics, found.config.in_channels))
    check_count(found.class_names, found.config.num_classes, where if names is None else uri.redact(names))
    check_scale(found.channels, found.config.in_channels, where if statistics is None else uri.redact(statistics))
    return found


def _file(source: str, hints: Hints) -> Pretrained:
    content, where = read_content(source), uri.redact(source)
    tensors, place = network(content.tensors, where)
    record = recorded(content.options, where)
    if record:
        check_told(record.process, hints.get("process"), where)
    said = (record.process, []) if record else process(content.options, tensors, source, hints.get("process"))
    diffusion, notes = said
    tensors, left_out = of_repa(tensors)
    average = unread_average([*content.tensors, *content.options], place)
    if hints.get("classes") is None:
        hints = {**hints, "classes": _recorded_classes(content)}
    config = infer(tensors, hints, where)
    if place or average:
        other = f", not from the average under {average}, whose tensors have no names of a DiT" if average else ""
        notes = [f"read from {place or 'the file'}{other}", *notes]
    state = fitted(config, completed(config, tensors), where)
    names, channels = (record.class_names, record.channels) if record else (None, None)
    notes += left_out + ([] if record else _open(config, hints))
    found = Pretrained(config, state, diffusion, channels=channels, class_names=names, notes=tuple(notes))
    return _as_flow(found, hints.get("process"))


def _open(config: AnyConfig, hints: Hints) -> list[str]:
    """What the file of a DiT with later options leaves open, a line each."""
    if not isinstance(config, DiTConfig) or not config.options:
        return []
    bare = [] if config.rope else ["assumed: no RoPE, since the file has no feat_rope"]
    scaled = "latents on the autoencoder's scale; those of LightningDiT are normalised (--latent-statistics)"
    return bare if hints.get("latent_statistics") else [*bare, f"assumed: {scaled}"]


def _as_flow(found: Pretrained, told: Told | None) -> Pretrained:
    """The same model; a flow in our time, and without outputs that it does not use."""
    config, state, notes = found.config, found.state, list(found.notes)
    if not isinstance(found.diffusion, FlowConfig):
        return found
    if told == "reversed-flow":
        state = reversed_time(state, found.diffusion)
        notes.append("its time was turned round, so that it is 0 at the noise: in the first and the last Linear layer")
    if config.learn_variance:
        config, state = without_variance(config, state)
        notes.append("left out: the second half of the outputs, which flows do not use")
    return replace(found, config=config, state=state, notes=tuple(notes))


def _recorded_classes(content: Content) -> int | None:
    """The number of classes that a training script's options name, if they name one."""
    found = {value for name, value in content.options.items() if name.rpartition(".")[2] == "num_classes"}
    value = found.pop() if len(found) == 1 else None
    return value if type(value) is int else None


def _folder(source: str, hints: Hints) -> Pretrained:
    where = uri.redact(source)
    try:
        names = uri.names(source)
    except InputError:
        raise
    except Exception as error:  # file systems promise no exception types
        raise InputError(f"{where}: cannot be listed ({one_line(error)}); {KINDS}") from error
    if MODEL in names:
        return _ours(source, hints.get("process"))
    if PIPELINE in names:
        return _pipeline(source, names, hints)
    if diffusers.CONFIG in names:
        return _diffusers(source, names, hints)
    for name, remedy in SHARDED.items():
        if name in names:
            raise InputError(f"{where}: holds the shards of {remedy} makes one file of them")
    if names == [where.rpartition("/")[2]]:  # a file lists itself
        raise InputError(f"{where}: a checkpoint's file ends in {', '.join(PICKLES)} or {SAFETENSORS}; rename it")
    raise InputError(f"{where}: not a checkpoint; {KINDS}")


def _ours(source: str, told: Told | None) -> Pretrained:
    trained = load(source)
    config, card = trained.card.model, trained.card
    if not (
        (isinstance(config, DiffiTConfig) and config.condition == "tmsa")
        or (isinstance(config, DiTConfig) and config.block == "adaln_zero")
    ):
        raise InputError(f"{uri.redact(source)}: {MODEL} describes another model; {LAYOUT}")
    if isinstance(card.diffusion, EDMConfig):
        raise InputError(f"{uri.redact(source)}: was trained with the process edm, which these layouts do not have")
    check_told(card.diffusion, told, uri.redact(source))
    names = card.class_names if config.num_classes else None
    state = trained.model.state_dict()
    return Pretrained(config, state, card.diffusion, card.vae, card.channels, class_names=names)


def _pipeline(source: str, names: list[str], hints: Hints) -> Pretrained:
    """The transformer of a diffusers pipeline, with the process of its scheduler."""
    vae = uri.join(source, VAE) if VAE in names else None
    if not uri.exists(scheduler := uri.join(source, diffusers.SCHEDULER)):
        return replace(_folder(uri.join(source, TRANSFORMER), hints), vae=vae)
    diffusion = diffusers.process(_bytes(scheduler), uri.redact(source))
    check_told(diffusion, hints.get("process"), uri.redact(source))
    return replace(_folder(uri.join(source, TRANSFORMER), hints), diffusion=diffusion, vae=vae, notes=())


def _diffusers(source: str, names: list[str], hints: Hints) -> Pretrained:
    where = uri.redact(source)
    if sharded := [name for name in names if name.endswith(".index.json")]:
        hint = "save_pretrained(..., max_shard_size='100GB') writes it whole"
        raise InputError(f"{where}: {sharded[0]} says that the weights are in shards; {hint}")
    weights = next((name for name in DIFFUSERS_WEIGHTS if name in names), DIFFUSERS_WEIGHTS[0])
    config, content = _bytes(uri.join(source, diffusers.CONFIG)), read_content(uri.join(source, weights))
    found = diffusers.from_diffusers(config, content.tensors, where)
    diffusion, notes = process(content.options, content.tensors, source, hints.get("process"))
    return _as_flow(Pretrained(*found, diffusion, notes=tuple(notes)), hints.get("process"))


def _bytes(url: str) -> bytes:
    try:
        return uri.read(url, uri.MAX_TEXT)
    except StorageError as error:
        raise InputError(str(error)) from error
