"""What weights cannot say: recorded in what we write, or told."""

from pathlib import Path
from typing import Any

import pytest
from other_checkpoints import refusal, same, saved
from random_dit import pretrained, random_dit
from safetensors.torch import save_file

from dit.convert import Layout, read, write
from dit.convert.record import KEY
from dit.diffusion.config import DiffusionConfig
from storage import uri

NAMES = tuple(f"n{number:02}" for number in range(10))


@pytest.fixture
def names(tmp_path: Path) -> str:
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n")
    return str(tmp_path / "names.txt")


def test_names_are_told_once(tmp_path: Path, names: str) -> None:
    source = saved(tmp_path, random_dit().state_dict())
    assert read(source, heads=4).class_names is None
    found = read(source, heads=4, class_names=names)
    assert found.class_names == NAMES
    write(found, str(tmp_path / "x.safetensors"), "reference")
    again = read(str(tmp_path / "x.safetensors"), heads=4)
    assert (again.class_names, again.diffusion, again.notes) == (NAMES, DiffusionConfig(), ())
    assert same(again.state, found.state)
    message = refusal(tmp_path / "x.safetensors", class_names=names)
    assert message.endswith("x.safetensors: has the names of its classes; remove --class-names")


@pytest.mark.parametrize("layout", ["diffusers", "pipeline"])
def test_a_folder_of_diffusers_is_told_the_names(tmp_path: Path, names: str, layout: Layout) -> None:
    write(pretrained(random_dit()), str(tmp_path / "theirs"), layout)
    assert read(str(tmp_path / "theirs"), class_names=names).class_names == NAMES


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"a\nb\n", "names.txt: has the names of 2 classes, and the model has 10"),
        (b"", "names.txt: has the names of 0 classes, and the model has 10"),
        (b"\n".join(b"%d" % (number % 9) for number in range(10)), "names.txt: names two classes '0'"),
        (b"\xff\xfe\n", "names.txt is no text in UTF-8"),
        (None, "names.txt: no such object"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, text: bytes | None, reason: str) -> None:
    place = tmp_path / "names.txt"
    if text is not None:
        place.write_bytes(text)
    assert reason in refusal(saved(tmp_path, random_dit().state_dict()), class_names=str(place))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("", "ditflow in its metadata is not a record of ours: "),
        ("{}", "record of ours: process: "),
        ('{"process": {"kind": "edm"}}', "record of ours: process: "),
        ('{"process": {"kind": "flow", "path": "round"}}', "record of ours: process.flow.path: "),
        ('{"process": {"kind": "gaussian"}, "class_names": ["a"]}', "has the names of 1 classes, and the model has 10"),
    ],
)
def test_records_that_are_none(tmp_path: Path, record: str, reason: str) -> None:
    save_file(random_dit().state_dict(), tmp_path / "x.safetensors", {KEY: record})
    assert reason in refusal(tmp_path / "x.safetensors")


def test_a_record_counts_on_any_file_system(tmp_path: Path, names: str) -> None:
    hints: Any = {"heads": 4, "class_names": names}
    url = "memory://convert-record/x.safetensors"
    write(read(saved(tmp_path, random_dit().state_dict()), **hints), url, "reference")
    assert read(url, heads=4).class_names == NAMES
    assert uri.exists(url)
