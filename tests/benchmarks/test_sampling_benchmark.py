"""The benchmark of samplers, in small."""

from pathlib import Path

import pytest

from benchmarks import sampling
from flows.demo.digits import write_digits
from flows.recipe import Recipe, load_recipe

TINY = (
    "train.steps=2",
    "train.checkpoint_every=2",
    "train.batch_size=8",
    "train.model.size={depth: 1, width: 32, heads: 2}",
)


def few_digits(folder: Path) -> None:
    if folder.exists():
        return
    write_digits(folder)
    for label in folder.glob("*/*"):
        for image in sorted(label.iterdir())[8:]:
            image.unlink()


def tiny(name: str, overrides: list[str]) -> Recipe:
    return load_recipe(name, [*overrides, *TINY])


def test_rows_have_passes_and_distance_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "write_digits", few_digits)
    monkeypatch.setattr(sampling, "load_recipe", tiny)
    monkeypatch.setattr(sampling, "STEPS", {"demo": {"ddim": (2,)}, "demo-flow": {"heun": (2,), "euler": (3,)}})
    monkeypatch.setattr(sampling, "TOLERANCES", (0.1,))
    rows = sampling.measure(str(tmp_path), 80)
    assert [(row["process"], row["sampler"]) for row in rows] == [
        ("gaussian", "ddim"),
        ("flow", "heun"),
        ("flow", "euler"),
        ("flow", "dopri5"),
    ]
    assert [row["nfe"] for row in rows[:3]] == [2, 3, 3]
    assert rows[3]["nfe"] >= 8
    assert all(row["distance"] > 0 and row["margin"] > 0 for row in rows)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")}
    assert sampling.measure(str(tmp_path), 80) == rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")} == made
    axes = sampling.plot(rows).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        *("ddim (gaussian)", "heun (flow)", "euler (flow)", "dopri5 (flow)")
    ]
