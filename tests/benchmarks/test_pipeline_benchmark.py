"""The benchmark of orchestration, in small."""

from pathlib import Path

from small import few_digits

from benchmarks.pipeline import bare_seconds
from flows.recipe import load_recipe


def test_every_stage_before_the_registry_is_run_and_timed(tmp_path: Path) -> None:
    digits = few_digits(tmp_path / "digits", {"train": 6, "held_out": 2})
    splits = [f"archive.{split}={digits / split}" for split in ("train", "held_out")]
    tiny = ["train.model.size={depth: 1, width: 32, heads: 2}", "train.steps=2", "train.batch_size=8"]
    recipe = load_recipe("demo", [*splits, *tiny, "sample.count=20", "sample.steps=2"])
    seconds = bare_seconds(recipe, tmp_path)
    assert list(seconds) == ["shard", "encode", "train", "sample", "evaluate"]
    assert all(each > 0 for each in seconds.values())
