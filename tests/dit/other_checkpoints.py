"""Checkpoints as others save them."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.convert import read
from storage.errors import InputError

Weights = dict[str, torch.Tensor]


def saved(tmp_path: Path, content: object, name: str = "x.pt") -> str:
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def refusal(source: Path | str, **hints: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(str(source), heads=4, **hints)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def options(**values: object) -> argparse.Namespace:
    return argparse.Namespace(global_seed=0, **values)
