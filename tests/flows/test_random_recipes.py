"""Random recipes against an obvious reading: a field holds what was written, or the recipe is refused in one line."""

from pathlib import Path

import pytest
import yaml
from command_line import refused
from random_recipes import REFUSED, Case, held, random_recipe

from flows.recipe import load_recipe
from flows.recipe_file import RECIPES
from storage.errors import InputError

QUICK, ALL = range(12), range(12, 112)


def write(case: Case, folder: Path) -> str:
    """The recipe's file: the demo with the case's groups in the place of its own, whose required fields it keeps."""
    mine = {line.rstrip(":") for line in case.lines if not line.startswith(" ")}
    demo = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    names = {key.rpartition(".")[0] for key in case.written}
    text = yaml.safe_dump({group: value for group, value in demo.items() if group not in mine})
    lines = list(case.lines)
    for group, required in (("archive", "train: /data"), ("encode", "resolution: 32"), ("evaluate", "extractor: {}")):
        name = required.partition(":")[0]
        given = any(key.startswith(f"{group}.{name}") for key in case.written) and group in names | mine
        if group in mine and not (given and any(line.strip().startswith(f"{name}:") for line in lines)):
            lines.insert(lines.index(f"{group}:") + 1, f"  {required}")
    path = folder / "mine.yaml"
    path.write_text(text + "\n".join(lines) + "\n", "utf-8")
    return str(path)


def check(seed: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the recipe of a seed was read; fails if it was read as something else, or refused for no reason."""
    case = random_recipe(seed)
    path, root = write(case, folder), str(folder / case.root)
    certain = not case.twice and all(each.value is not REFUSED and not each.doubtful for each in case.written.values())
    try:
        recipe = load_recipe(path, case.overrides, root)
    except InputError:
        assert not certain, case
        sets = [part for override in case.overrides for part in ("--set", override)]
        refused(capsys, ["report", path, "--root", root, *sets])
        return False
    assert not case.twice, case
    for key, written in case.written.items():
        value = held(recipe, key)
        if isinstance(written.value, str):
            places = {"${recipe_dir}": str(folder), "${home}": root}
            assert value == places.get(written.value, written.value), (key, written)
        else:
            assert (type(value), value) == (type(written.value), written.value), (key, written)
    return True


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = [check(seed, tmp_path, capsys) for seed in QUICK]
    assert any(read)
    assert not all(read)


@pytest.mark.full
def test_a_hundred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = [check(seed, tmp_path, capsys) for seed in ALL]
    assert any(read)
    assert not all(read)
