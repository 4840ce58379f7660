import math
from pathlib import Path

import pytest
import yaml

from flows.recipe import load_recipe
from flows.yaml_text import parse
from storage.errors import InputError

PLAIN = {
    "a: 64": {"a": 64},
    "a: -3": {"a": -3},
    "a: 0": {"a": 0},
    "a: 400_000": {"a": 400_000},
    "a: 1e-4": {"a": 1e-4},  # PyYAML reads text here
    "a: 1.5": {"a": 1.5},
    "a: 0.5": {"a": 0.5},
    "a: .5": {"a": 0.5},
    "a: true": {"a": True},
    "a: null": {"a": None},
    "a:": {"a": None},
    "a: ~": {"a": None},
    "a: 'no'": {"a": "no"},
    'a: "0100"': {"a": "0100"},
    "a: 1.2.3": {"a": "1.2.3"},
    "a: s3://bucket/a#b": {"a": "s3://bucket/a#b"},
    "a: b # said aside": {"a": "b"},
    "[1, {b: c}]": [1, {"b": "c"}],
    "": None,
    "a: |\n  two\n  lines": {"a": "two\nlines"},
}


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_written_is_what_is_read(text: str) -> None:
    found = parse(text, "mine.yaml")
    assert found == PLAIN[text]
    if text != "a: 1e-4":
        assert found == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["a: !!str yes", "a: !!int abc", "!!bool maybe", "a: !!timestamp x", "!!set {a, b}"])
def test_tags_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^mine\.yaml: line 1: tags are not supported; write the value alone$"):
        parse(text, "mine.yaml")


@pytest.mark.parametrize("text", ["a: /b #1", "{a: /b/}#c}", "a: 'b'#c", "a: [b]# c"])
def test_a_value_that_a_hash_cuts_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^mine\.yaml: line 1: # begins a comment here; put the value in quotes"):
        parse(text, "mine.yaml")


@pytest.mark.parametrize("text", ["a: /b\n  c", "a: 'b\n  c'", "{a: b\n c}"])
def test_a_text_that_goes_on_in_the_next_line_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^mine\.yaml: line 1: the text goes on in the next line"):
        parse(text, "mine.yaml")


def test_a_letter_that_json_writes_as_two_escapes() -> None:
    assert parse('"\\ud83d\\ude42"', "mine.yaml") == "🙂"
    with pytest.raises(InputError, match=r"^mine\.yaml: not YAML"):
        parse('"\\ud83d"', "mine.yaml")


def test_infinity_is_a_number() -> None:
    assert parse("[.inf, -.inf]", "mine.yaml") == [math.inf, -math.inf]


@pytest.mark.parametrize("value", ["0100", "0x1F", "0b11", "40_00", "0o17", "09", "1:30", "1:30.5", "0100.5", "00"])
def test_another_notation_of_a_number_is_refused(value: str) -> None:
    with pytest.raises(
        InputError, match=rf"^mine\.yaml: line 2: {value} can be read as a number in another notation; "
    ):
        parse(f"a: 1\nb: {value}", "mine.yaml")


@pytest.mark.parametrize("value", ["yes", "No", "on", "OFF"])
def test_another_word_for_a_truth_value_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=rf"^mine\.yaml: line 1: {value} can be read as a truth value; .* quotes"):
        parse(f"a: {value}", "mine.yaml")


@pytest.mark.parametrize("value", ["2001-01-01", "2001-12-14t21:59:43.10-05:00", "="])
def test_a_date_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"line 1: .* can be read as a date or another special value"):
        parse(f"a: {value}", "mine.yaml")


def test_a_key_that_stands_twice_is_named_with_both_lines() -> None:
    with pytest.raises(InputError, match=r"^mine\.yaml: line 4: steps is already set in line 2; keep one of the two$"):
        parse("train:\n  steps: 1\n  seed: 2\n  steps: 3\n", "mine.yaml")
    with pytest.raises(InputError, match=r"line 1: a is already set in line 1"):
        parse("{a: 1, a: 2}", "mine.yaml")


def test_aliases_cannot_multiply() -> None:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    with pytest.raises(InputError, match=r"^mine\.yaml: line 2: aliases are not supported; write the value out$"):
        parse("\n".join(lines), "mine.yaml")
    with pytest.raises(InputError, match=r"line 3: << can be read as .* another special value"):
        parse("a: &a {b: 1}\nc:\n  <<: *a\n", "mine.yaml")


def test_depth_is_bounded() -> None:
    assert parse("[" * 40 + "]" * 40, "mine.yaml")
    with pytest.raises(InputError, match=r"^mine\.yaml: line 1: nested deeper than 50 levels$"):
        parse("[" * 10_000, "mine.yaml")


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\x00", "a: !!python/object:os.system {}", "--- 1\n--- 2", "9" * 5000]
)
def test_what_is_not_yaml_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^mine\.yaml: .+$") as caught:
        parse(text, "mine.yaml")
    assert "\n" not in str(caught.value)


def test_a_file_that_was_not_fetched_is_named() -> None:
    with pytest.raises(InputError, match=r"^x\.yaml: a Git LFS pointer, not the file itself"):
        parse("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "x.yaml")


def test_an_override_of_text_is_read_as_typed() -> None:
    sets = ["name=1.10", "archive.train=/data/no: # 1", "registry.model_name=yes", "archive.held_out=null"]
    recipe = load_recipe("demo", sets)
    assert (recipe.name, recipe.archive.train) == ("1.10", "/data/no: # 1")
    assert (recipe.registry.model_name, recipe.archive.held_out) == ("yes", None)
    assert load_recipe("demo", ["name='quoted'"]).name == "quoted"
    slurm = load_recipe("demo", ["launch={kind: slurm}", "launch.options.time='1:30'"])
    assert slurm.launch.options == {"time": "1:30"}  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"^--set train\.steps=0100: line 1: 0100 can be read as a number in another"):
        load_recipe("demo", ["train.steps=0100"])
    with pytest.raises(InputError, match=r"^--set launch\.options\.time=1:30: line 1: 1:30 can be read as a number"):
        load_recipe("demo", ["launch={kind: slurm}", "launch.options.time=1:30"])


def test_a_recipes_file_may_end_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "MINE.YAML"
    path.write_text("name: mine\narchive: {train: /data}\nencode: {vae: null, resolution: 32}\n")
    assert load_recipe(str(path)).name == "mine"
