"""A recipe of one's own, and the schema that its first line names."""

import json
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from command_line import refused

from flows.command.demo import RECIPES as OF_DIGITS
from flows.command.main import main
from flows.recipe import Recipe, load_recipe
from flows.recipe_file import presets
from flows.recipe_schema import PATH
from flows.sweep import load_recipes


@pytest.mark.parametrize("preset", presets())
def test_a_copy_is_the_preset_under_another_name(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine.yaml", "--from", preset]) == 0
    said = capsys.readouterr().out
    assert said.startswith("mine.yaml is written; change it, then run\n  ditflow ")
    assert said.endswith("demo --recipe mine.yaml\n" if preset in OF_DIGITS else "ditflow run mine.yaml\n")
    for copy, original in zip(load_recipes("mine.yaml"), load_recipes(preset), strict=True):
        assert copy.name.startswith("mine")
        assert same(copy) == same(original)
    place = Path("mine.yaml").read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert Path(url2pathname(urlsplit(place).path)).samefile(PATH)


def same(recipe: Recipe) -> str:
    """The values of a recipe that a copy shares with it."""
    values = recipe.model_dump(mode="json")
    del values["name"], values["registry"]["model_name"]
    return json.dumps(values).replace("/recipes/../", "/")


def test_a_copy_registers_models_of_its_own(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "my-flowers.yml")]) == 0
    assert load_recipe(str(tmp_path / "my-flowers.yml")).registry.model_name == "my-flowers"


def test_a_recipe_of_ones_own_is_copied_too(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "one.yaml")]) == 0
    (tmp_path / "one.yaml").write_text((tmp_path / "one.yaml").read_text().replace("steps: 1200", "steps: 7"))
    assert main(["init", str(tmp_path / "two.yaml"), "--from", str(tmp_path / "one.yaml")]) == 0
    assert (tmp_path / "two.yaml").read_text() == (tmp_path / "one.yaml").read_text().replace(": one", ": two")
    assert load_recipe(str(tmp_path / "two.yaml")).train.steps == 7


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    assert "mine.yaml: cannot be written (File exists)" in refused(capsys, ["init", str(tmp_path / "mine.yaml")])
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert "name it like mine.yaml" in refused(capsys, ["init", str(tmp_path / "mine.txt")])
    assert "name it like mine.yaml" in refused(capsys, ["init", str(tmp_path / "my recipe.yaml")])
    assert "did you mean demo?" in refused(capsys, ["init", str(tmp_path / "other.yaml"), "--from", "demoo"])
    assert not (tmp_path / "other.yaml").exists()


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == PATH.read_text("utf-8")
