"""The sweeps of the papers' claims, and what is made of their runs, in small and on the digits."""

from pathlib import Path

import numpy as np
import pytest
from small import few_digits

from benchmarks.replication import __main__ as replication
from benchmarks.replication.runs import Run, finished
from dit.metrics.comparison import Estimate
from flows.contract import STAGES, Source
from flows.demo import CLASSIFIER
from flows.sweep import load_recipes
from storage.errors import InputError
from storage.tracker import NullTracker

SWEEPS = {path.stem: path for path in Path(replication.__file__).parent.glob("*.yaml")}
PICTURE = b"\x89PNG"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Values that make a sweep of photographs one of digits, and tiny."""
    digits = few_digits(tmp_path_factory.mktemp("digits") / "digits", {"train": 6, "held_out": 2})
    return [
        *(f"archive.{split}={digits / split}" for split in ("train", "held_out")),
        *("encode.vae=null", "encode.resolution=8", "encode.block_rows=60", "encode.chunk_rows=60"),
        *("train.steps=2", "train.batch_size=8", "sample.count=20", "sample.steps=2"),
        f"evaluate.extractor={{name: demo-digits, weights: {CLASSIFIER}}}",
    ]


def run_all(sweep: str, overrides: list[str], root: Path) -> None:
    for recipe in load_recipes(str(SWEEPS[sweep]), overrides):
        source: Source = recipe.archive
        for name in ("shard", "encode", "train", "sample", "evaluate"):
            stage, config = STAGES[name], recipe.config_of(name)
            out = stage.output(str(root), config, source)
            source = out.committed(stage.kind) or stage.run(config, source, out=out, tracker=NullTracker())


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_is_one_of_small_models_of_photographs(sweep: str) -> None:
    recipes = load_recipes(str(SWEEPS[sweep]))
    assert {recipe.archive.train for recipe in recipes} == {"cifar10/train.zip"}
    assert len({recipe.pipeline_id for recipe in recipes}) == len(recipes)


def test_figures_of_finished_sweeps(overrides: list[str], tmp_path: Path) -> None:
    def runs(sweep: str) -> list[Run]:
        return finished(sweep, overrides, str(tmp_path))

    with pytest.raises(InputError, match="process-flow-0: not finished; run the sweep process first"):
        runs("process")
    overrides = [*overrides, "train.model.size={depth: 1, width: 32, heads: 2}"]
    for sweep in ("blocks", "process", "guidance"):
        run_all(sweep, overrides, tmp_path)
    found, picture = replication.processes(runs)
    two = [("dit adaln_zero", 2, seed) for seed in (0, 1)] + [("dit adaln_zero, flow", 3, seed) for seed in (0, 1)]
    assert [(run.variant, run.passes, run.seed) for run in found] == two
    assert picture.startswith(PICTURE)
    assert [run.guidance_scale for run in replication.guidance(runs)[0]] == [1, 1.25, 1.5, 2, 3, 4, 6]
    kinds = [run.variant for run in replication.blocks(runs)[0][::2]]
    assert kinds == ["dit in_context", "dit cross_attention", "dit adaln", "dit adaln_zero"]
    first, second = (np.array([run.distance.value for run in found[at::2]]) for at in (0, 1))
    halves = np.abs(first - second) / 2
    error = 4.303 * np.sqrt(2 * (halves**2).sum() / 2) / np.sqrt(2)  # t with two degrees of freedom
    means = replication.over_seeds(found)
    assert [each.value for each in means.values()] == pytest.approx((first + second) / 2)
    assert [each.margin for each in means.values()] == pytest.approx([error] * 2, rel=1e-3)
    assert replication.over_seeds(found[::2])["dit adaln_zero"] == Estimate(first[0])
    row = found[0].row()
    assert row.startswith("| dit adaln_zero 1x32x2/2 | 0 | 2 | ")
    assert row.count("|") == Run.HEADER.splitlines()[0].count("|")


def test_compute_is_counted(overrides: list[str], tmp_path: Path) -> None:
    overrides = [*overrides, "train.milestones=null", "evaluate_milestones=null"]

    def runs(sweep: str) -> list[Run]:
        return finished(sweep, overrides, str(tmp_path)) if sweep == "patches" else []

    run_all("patches", overrides, tmp_path)
    found, picture = replication.sizes(runs)
    small, base = found
    assert [run.model for run in found] == ["2x64x2/1", "3x96x3/1"]
    linear = 64 * 3 * 12 * 96**2  # tokens, blocks, and their weights that see each token
    assert 0.85 < linear / (1e9 * base.gmac) < 1
    assert base.training_flops == pytest.approx(6e9 * base.gmac * 2 * 8)
    assert base.sampling_gmac == 2 * base.gmac
    assert small.gmac < base.gmac / 3
    assert picture.startswith(PICTURE)
    assert replication.training_compute(runs)[1].startswith(PICTURE)
