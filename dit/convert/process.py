"""Which diffusion process a checkpoint was trained for: what it says, what it was told, or what is assumed.

SiT and REPA have the names and shapes of a DiT, and LightningDiT those of a DiT with options, but they are flows. Some
flows count time from the noise to the data, as we do, others from the data to the noise. No file says which.
"""

import re
from typing import Final, Literal

from torch import Tensor

from dit.convert.files import Option
from dit.convert.layout import PROJECTORS, TIME_QKV
from dit.diffusion.config import DiffusionConfig, FlowConfig
from storage import uri
from storage.errors import InputError

Told = Literal["gaussian", "flow", "reversed-flow"]
"""What a user says: noise prediction, as the published DiT; a flow; or one whose time is 1 at the noise."""
Found = DiffusionConfig | FlowConfig
ASK: Final = (
    "pass --process flow if its time is 0 at the noise (SiT, LightningDiT), or reversed-flow if it is 1 there (REPA)"
)
FLOW: Final = re.compile(r"(?<![a-z])(sit|repa|lightningdit|fasterdit)(?![a-z])", re.IGNORECASE)
"""Names of models that are trained by flow matching."""
LIGHTNING: Final = re.compile(r"(^|\.)(mlp\.w12|feat_rope|q_norm)\.")
"""Names of tensors of LightningDiT and the like."""
MODEL_OPTIONS: Final = ("model", "model_type", "model_name", "arch")
NOISE: Final = ("noise", "eps", "epsilon")
PUBLISHED: Final = {
    "prediction": NOISE,
    "prediction_type": NOISE,
    "predict_xstart": ("false",),
    "noise_schedule": ("linear",),
    "beta_schedule": ("linear",),
    "diffusion_steps": ("1000",),
    "num_train_timesteps": ("1000",),
}
"""Options that name a process, and their values for the published one."""
PATHS: Final = {"linear": "linear", "gvp": "gvp", "cosine": "gvp", "vp": "vp"}
PREDICTIONS: Final = {"velocity": "velocity", "v": "velocity", "data": "data", "x": "data"} | dict.fromkeys(
    NOISE, "noise"
)
"""What options call the path and the prediction of a flow, and our names."""


def process(
    options: dict[str, Option], tensors: dict[str, Tensor], source: str, told: Told | None
) -> tuple[Found, list[str]]:
    """The process that a checkpoint was trained for, and what was assumed, a line each.

    Args:
        options: plain values beside the weights.
        tensors: the weights.
        source: location of the checkpoint; its name may be that of a flow.
        told: what the user says.

    Raises:
        InputError: nobody says which flow it is, options and user contradict each other, or it is another process.
    """
    where = uri.redact(source)
    if told in ("flow", "reversed-flow"):
        return _flow(options, where)
    if _names_the_published(options, where, told) or told:
        return DiffusionConfig(), []
    if reason := _looks_like_a_flow(tensors, where):
        raise InputError(f"{where}: {reason}; {ASK}, or gaussian if it predicts noise")
    if any(TIME_QKV in name for name in tensors):
        known = "it predicts noise of 1000 linear steps, as the published DiffiT"
        return DiffusionConfig(), [f"assumed: {known}. --process gaussian confirms"]
    flows = "SiT and REPA, trained by flow matching, look the same and would draw noise"
    return DiffusionConfig(), [
        f"assumed: it predicts noise of 1000 linear steps, as the published DiT; {flows}. --process gaussian confirms"
    ]


def check_told(found: Found, told: Told | None, where: str) -> None:
    """Check what a user says of a checkpoint that records its process.

    Raises:
        InputError: it is another one.
    """
    if told not in (None, found.kind):
        raise InputError(f"{where}: has the process {found.kind}, not {told}; remove --process")


def _flow(options: dict[str, Option], where: str) -> tuple[FlowConfig, list[str]]:
    """The flow that options name; for what they leave open, that of the published models."""
    fields, notes = {}, []
    for field, option, known in (("path", "path_type", PATHS), ("predict", "prediction", PREDICTIONS)):
        named = {str(value) for name, value in options.items() if name.rpartition(".")[2] == option}
        if unknown := sorted(text for text in named if text.lower() not in known):
            raise InputError(f"{where}: its {option} is {unknown[0]}, and not one of {', '.join(known)}")
        found = sorted({known[text.lower()] for text in named})
        if len(found) > 1:
            raise InputError(f"{where}: names more than one {option}: {', '.join(found)}; save one model alone")
        if found:
            fields[field] = found[0]
        else:
            default = FlowConfig.model_fields[field].default
            notes.append(f"assumed: {option} {default}, as the published SiT, REPA and LightningDiT")
    return FlowConfig.model_validate(fields), notes


def _looks_like_a_flow(tensors: dict[str, Tensor], where: str) -> str | None:
    """Why a checkpoint that names no process may be a flow; None if nothing says so."""
    if found := next((name for name in tensors if name.startswith(PROJECTORS)), None):
        return f"tensor {found} is REPA's, whose models are flows"
    if found := next((name for name in tensors if LIGHTNING.search(name)), None):
        return f"tensor {found} is a LightningDiT's or the like, which was trained by flow matching"
    if named := FLOW.search(where.rpartition("/")[2]):
        return f"is named after {named[0]}, a model trained by flow matching"
    return None


def _names_the_published(options: dict[str, Option], where: str, told: Told | None) -> bool:
    """Whether options name the published process. Refuses those of another."""
    named = False
    for name, value in options.items():
        key, text = name.rpartition(".")[2].replace("-", "_"), str(value)
        model = key in MODEL_OPTIONS
        if key == "path_type" or (model and FLOW.search(text)) or (key == "prediction" and text in ("v", "velocity")):
            hint = f"it does not predict noise; {ASK}" if told else ASK
            raise InputError(f"{where}: its {name} is {text}, so it was trained by flow matching; {hint}")
        if key in PUBLISHED and text.lower() not in PUBLISHED[key]:
            published = "the published DiT predicts noise of 1000 linear steps, and nothing else is read"
            raise InputError(f"{where}: its {name} is {text}, another process; {published}")
        named |= key.startswith("prediction") or (model and bool(re.match(r"DiT\b", text)))
    return named
