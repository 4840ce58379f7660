"""What a recipe says of the evaluation of its milestones, and which of them is best."""

from collections.abc import Sequence

import pytest

from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.metrics.extractors.load import ExtractorRef
from flows.over_training import best
from flows.recipe import Recipe, load_recipe
from flows.registry.config import PromotionRule, RegisterConfig
from storage.errors import InputError
from storage.manifest import stage_output

MILESTONES = "train.milestones=400"
ASKED = "evaluate_milestones={sample: {count: 50}}"


def test_everything_is_as_in_the_recipe_but_what_is_named() -> None:
    recipe = load_recipe("demo", ["train.milestones=[500, 100, 1200]", "evaluate_milestones.sample.count=50"])
    asked = recipe.over_training
    assert asked is not None
    assert asked.steps == [100, 500, 1200]
    assert asked.sample == recipe.sample.model_copy(update={"count": 50})
    assert asked.evaluate == recipe.evaluate
    assert asked.configs("runs")[500] == load_recipe("demo", ["train.steps=500"]).train
    plain = load_recipe("demo", [MILESTONES, "evaluate_milestones={}"]).over_training
    assert plain is not None
    assert (plain.sample, plain.evaluate) == (recipe.sample, recipe.evaluate)
    assert load_recipe("demo").over_training is None


def test_every_way_to_say_it_is_the_same() -> None:
    several = ["evaluate_milestones.sample.count=50", "evaluate_milestones.sample.weights=raw"]
    one = load_recipe("demo", [MILESTONES, *several, "evaluate_milestones.evaluate.batch_size=8"])
    whole = "evaluate_milestones={sample: {count: 50, weights: raw}, evaluate: {batch_size: 8}}"
    assert one == load_recipe("demo", [MILESTONES, whole])
    assert Recipe.model_validate_json(one.model_dump_json()) == one  # as the form sends it
    assert one.over_training is not None
    assert (one.over_training.sample.weights, one.over_training.evaluate.batch_size) == ("raw", 8)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([ASKED], "--set evaluate_milestones={sample: {count: 50}}: evaluate_milestones: needs train.milestones, the"),
        ([MILESTONES, ASKED, "evaluate=null"], "evaluate_milestones: needs evaluate.extractor"),
        (
            [MILESTONES, "evaluate_milestones.sample.count=0"],
            "--set evaluate_milestones.sample.count=0: evaluate_milestones.sample.count: Input should be greater than",
        ),
        ([MILESTONES, "evaluate_milestones.sample.cuont=9"], "evaluate_milestones.sample.cuont: no such key"),
        ([MILESTONES, "evaluate_milestones.evaluate.batch_size=x"], "evaluate_milestones.evaluate.batch_size: must be"),
        ([MILESTONES, "evaluate_milestones.samples={}"], "evaluate_milestones.samples: no such key"),
        ([MILESTONES, ASKED, "train.decay=cosine"], "train: milestones: need decay: none"),
        (["registry.checkpoint=best"], "registry.checkpoint: best needs evaluate_milestones"),
        (["registry.checkpoint=first"], "registry.checkpoint: Input should be 'last' or 'best'"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(overrides: Sequence[str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("demo", overrides)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_to_take_is_no_part_of_what_a_version_is() -> None:
    assert RegisterConfig(checkpoint="best").identity() == RegisterConfig().identity()


def measured(**metrics: float) -> MetricsManifest:
    """An evaluation with these metrics."""
    config = EvaluateConfig(extractor=ExtractorRef(weights="anywhere"))
    out = stage_output("memory://nothing", "evaluate", 1, config, parents={}, inputs={})
    return out.manifest(MetricsManifest, metrics=metrics, distance="FD[x]", conditions={})


def test_the_best_is_best_by_the_rule() -> None:
    points = {400: measured(fd=2.0, recall=0.5), 100: measured(fd=1.0, recall=0.1), 1200: measured(fd=1.0, recall=0.3)}
    assert best(points, PromotionRule()) == 100  # the earliest of two
    assert best(points, PromotionRule(metric="recall", direction="higher")) == 400
    assert best(points, PromotionRule(metric="recall")) == 100
    with pytest.raises(InputError, match=r"registry\.rule\.metric: no metric fid; choose one of fd, recall"):
        best(points, PromotionRule(metric="fid"))
