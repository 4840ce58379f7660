"""Which parameters of a model are trained: all, those that ``train.freeze`` leaves, or adapters."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from dit.models.lora import Lora, adapt, linear_layers
from storage.errors import InputError


def choose(model: nn.Module, freeze: Sequence[str], lora: Lora | None) -> None:
    """Train a part of a model: the others of its parameters get neither gradient nor moments.

    Args:
        model: whose parameters to freeze, and to give adapters to; fixed parameters stay fixed.
        freeze: as `dit.training.config.TrainConfig.freeze`.
        lora: as `dit.training.config.TrainConfig.lora`.

    Raises:
        InputError: a pattern fits nothing, or no parameter is left.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = _chosen(parameters, ("*", *freeze) if lora else freeze, "train.freeze")
    if lora is None and len(names) == len(parameters):
        raise InputError("train.freeze: no parameter is left to train; add a pattern after ! for what to train")
    for name in names:
        parameters[name].requires_grad_(False)
    if lora:
        layers = _chosen(linear_layers(model), lora.targets, "train.lora.targets")
        if not layers:
            raise InputError("train.lora.targets: no Linear layer is left; name one")
        adapt(model, layers, lora)


def _chosen(names: Iterable[str], patterns: Sequence[str], where: str) -> list[str]:
    """Those of the names that the patterns choose: the last one that fits decides, and one after ``!`` is against."""
    names = list(names)
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            some = ", ".join(names[:: max(1, len(names) // 4)][:5])
            what = "Linear layer" if "lora" in where else "parameter"
            raise InputError(f"{where}: {pattern} fits no {what}; there are {len(names):,}, such as {some}")
    return [name for name in names if _is_chosen(name, patterns)]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern.removeprefix("!"))


def _is_chosen(name: str, patterns: Sequence[str]) -> bool:
    last = [pattern for pattern in patterns if _fits(name, pattern)][-1:]
    return bool(last) and not last[0].startswith("!")
