"""The distance over the finished runs of a sweep: real runs of two sizes, a third one missing."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from small import SAMPLING, Small

from dit.models.choice import Shape
from dit.models.config import DiTConfig
from dit.models.cost import cost
from flows.command.main import main
from flows.demo import CLASSIFIER

SIZES = ({"depth": 1, "width": 32, "heads": 2}, {"depth": 2, "width": 32, "heads": 2})
MISSING = {"depth": 3, "width": 32, "heads": 2}
RECIPE = f"""
name: one
archive: {{train: "${{home}}/digits/train", held_out: "${{home}}/digits/held_out"}}
shard: {{images_per_shard: 50}}
encode: {{vae: null, resolution: 16, flips: false}}
train: {{model: {{kind: dit, patch_size: 4}}, steps: 2, batch_size: 8, learning_rate: 0.01, ema_decay: 0.5}}
sample:
  {{count: 30, labels: balanced, sampler: ddim, steps: 2, guidance_scale: 2, guidance_channels: all, batch_size: 30}}
evaluate: {{extractor: {{weights: {CLASSIFIER}}}}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    small = Small(root, tracked=False)
    latents = small.latents()
    for size in SIZES:
        small.evaluated(small.checkpoint(latents, shape=Shape(**size)))
    small.evaluated(small.checkpoint(latents, steps=3))
    small.evaluated(small.checkpoint(latents), SAMPLING.model_copy(update={"guidance_scale": 3.0}))
    return root


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "one.yaml").write_text(RECIPE)
    path = tmp_path / "sizes.yaml"
    vary = json.dumps({"train.model.size": [SIZES[1], SIZES[0], MISSING]})
    path.write_text(f"name: sizes\nbase: {tmp_path / 'one.yaml'}\nvary: {vary}\n")
    return path


def test_runs_and_lines(root: Path, sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", str(sweep), "--root", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["sizes-3x32x2"]
    assert [run["name"] for run in found["runs"]] == ["sizes-1x32x2", "sizes-2x32x2"]
    for run, size in zip(found["runs"], SIZES, strict=True):
        config = DiTConfig(input_size=16, in_channels=3, num_classes=10, patch_size=4, **size)
        assert run["gmac"] == cost(config).macs / 1e9
        assert run["images_seen"] == 16
        assert run["training_flops"] == 6 * cost(config).macs * 16
        metrics = json.loads(Path(run["manifest"]).read_text())["metrics"]
        assert run["distance"] == {
            key: metrics[f"fd{end}"] for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))
        }
    assert set(found["fits"]) == {"training FLOPs", "GMAC"}
    first, last = found["runs"]
    for x, law in (("training_flops", found["fits"]["training FLOPs"]), ("gmac", found["fits"]["GMAC"])):
        for run in (first, last):
            assert law["coefficient"] * run[x] ** law["exponent"] == pytest.approx(run["distance"]["value"])
    assert Image.open(io.BytesIO(Path(found["picture"]).read_bytes())).width > 1000


def test_people_are_told_the_same(root: Path, sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", str(sweep), str(sweep), "--root", str(root)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("missing: sizes-3x32x2 has no metrics below this root") == 1
    assert printed.count(", 2 runs\n") == 2  # what is named twice counts once
    assert "of 30 samples against x = training FLOPs: " in printed
    assert printed.splitlines()[0].split() == [
        *("run", "params", "M", "GMAC", "images", "seen", "training", "FLOPs", "distance", "(95", "%", "interval)")
    ]


def test_what_has_seen_more_is_fitted_against_flops_alone(
    root: Path, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = sweep.with_name("longer.yaml")
    size = json.dumps({"train.model.size": SIZES[0], "train.steps": 3})
    longer.write_text(f"name: longer\nbase: {sweep.with_name('one.yaml')}\nchange: {size}\nvary: {{train.seed: [0]}}\n")
    assert main(["scaling", str(sweep), str(longer), "--root", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["sizes-1x32x2", "longer-0", "sizes-2x32x2"]
    assert set(found["fits"]) == {"training FLOPs"}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            ["--set", "train.steps=9"],
            "0 of 3 runs are finished; run the rest first (sizes-2x32x2, sizes-1x32x2, sizes-3x32x2)",
        ),
        (["--set", "evaluate=null"], "recipe sizes-2x32x2 has no evaluate; set evaluate.extractor"),
    ],
)
def test_what_is_wrong_is_named(
    root: Path, sweep: Path, capsys: pytest.CaptureFixture[str], more: list[str], reason: str
) -> None:
    assert main(["scaling", str(sweep), "--root", str(root), *more]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_numbers_under_other_conditions_are_refused(
    root: Path, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = sweep.with_name("guided.yaml")
    change = json.dumps({"train.model.size": SIZES[0], "sample.guidance_scale": 3})
    guided.write_text(
        f"name: guided\nbase: {sweep.with_name('one.yaml')}\nchange: {change}\nvary: {{train.seed: [0]}}\n"
    )
    assert main(["scaling", str(sweep), str(guided), "--root", str(root)]) == 2
    assert "cannot be compared; they differ in guidance_scale" in capsys.readouterr().err
