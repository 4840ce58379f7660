"""Which parameters of a model are trained."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from storage.errors import InputError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train a model's parameters no longer whose names fit the patterns: they get neither gradient nor moments.

    Args:
        model: whose parameters to freeze; fixed ones stay so.
        patterns: as `dit.training.config.TrainConfig.freeze`.

    Raises:
        InputError: a pattern fits no trained parameter, or none is left.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in frozen(parameters, patterns):
        parameters[name].requires_grad_(False)


def frozen(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those of the names that the patterns freeze. Errors as `freeze`."""
    names = list(names)
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            some = ", ".join(names[:: max(1, len(names) // 4)][:5])
            raise InputError(f"train.freeze: {pattern} fits no parameter; there are {len(names):,}, such as {some}")
    found = [name for name in names if _is_frozen(name, patterns)]
    if len(found) == len(names):
        raise InputError("train.freeze: no parameter is left to train; add a pattern after ! for what to train")
    return found


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern.removeprefix("!"))


def _is_frozen(name: str, patterns: Sequence[str]) -> bool:
    last = [pattern for pattern in patterns if _fits(name, pattern)][-1:]
    return bool(last) and not last[0].startswith("!")
