"""The class of each sample: at random, in turn, or as chosen by name."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from dit.samplers.noise import SampleNoise
from storage.errors import InputError

ClassName = Annotated[str, BeforeValidator(lambda key: str(key) if type(key) is int else key)]
Counts = Annotated[dict[ClassName, Annotated[int, Field(ge=1)]], Field(min_length=1)]
Labels = Literal["balanced", "random"] | Counts
"""How classes are chosen; a mapping has the number of images of each class, which come in the order of the classes."""


def class_label(name: str, class_names: Sequence[str]) -> int:
    """The label of a class, given its name, or its number where no class has this name.

    Raises:
        InputError: there is no such class.

    Examples:
        >>> class_label("dog", ["cat", "dog"]), class_label("0", ["cat", "dog"])
        (1, 0)
    """
    if name in class_names:
        return class_names.index(name)
    if re.fullmatch(r"[0-9]{1,9}", name) and int(name) < len(class_names):
        return int(name)
    close = get_close_matches(name, class_names, 1)
    hint = (
        f"did you mean {close[0]!r}?" if close else f"classes have a name or a number from 0 to {len(class_names) - 1}"
    )
    raise InputError(f"the model has no class {name!r}; {hint}")


def sample_labels(labels: Labels, indices: range, seed: int, class_names: Sequence[str]) -> Tensor:
    """The labels (B,), int64, of the samples with these indices.

    Raises:
        InputError: a chosen class is none of the model's.

    Examples:
        >>> sample_labels("balanced", range(5), 0, ["cat", "dog"]).tolist()
        [0, 1, 0, 1, 0]
        >>> sample_labels({"dog": 3, "cat": 1}, range(4), 0, ["cat", "dog"]).tolist()
        [0, 1, 1, 1]
    """
    if labels == "balanced":
        return torch.tensor([index % len(class_names) for index in indices])
    if isinstance(labels, Mapping):
        return _chosen(labels, class_names)[indices.start : indices.stop]
    return SampleNoise(seed, indices, (1, 1, 1)).labels(len(class_names))


def described(labels: Labels) -> str:
    """The choice in one line."""
    return labels if isinstance(labels, str) else ", ".join(f"{labels[name]} x {name}" for name in sorted(labels))


def _chosen(counts: Mapping[str, int], class_names: Sequence[str]) -> Tensor:
    """All labels in rising order, since the order of a mapping is no part of a config's identity."""
    pairs = sorted((class_label(name, class_names), count) for name, count in counts.items())
    labels, repeats = torch.tensor(pairs).unbind(1)
    return labels.repeat_interleave(repeats)
