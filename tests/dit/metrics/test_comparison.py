import pytest

from dit.metrics.comparison import Estimate, differing, gain

OLD = {"fd": 10.0, "fd_low": 7.0, "fd_high": 13.0, "recall": 0.5}


def test_margins_of_independent_estimates_add_in_squares() -> None:
    found = gain("fd", "lower", OLD, {"fd": 5.0, "fd_low": 1.0, "fd_high": 9.0})
    assert (found.value, found.margin) == (5.0, 5.0)  # 3, 4, 5
    assert found.exceeds(0.0)
    assert not found.exceeds(0.1)
    assert str(found) == "better by 5 ± 5"


@pytest.mark.parametrize(("direction", "value"), [("lower", -0.1), ("higher", 0.1)])
def test_direction_says_which_is_better(direction: str, value: float) -> None:
    found = gain("recall", direction, OLD, {"recall": 0.6})  # type: ignore[arg-type]
    assert found.value == pytest.approx(value)
    assert found.margin == 0
    assert found.exceeds(0.05) is (direction == "higher")
    assert str(found).startswith("better" if direction == "higher" else "worse")


def test_the_same_number_is_no_gain() -> None:
    assert not gain("recall", "higher", OLD, OLD).exceeds(0.0)


def test_a_metric_that_is_missing() -> None:
    with pytest.raises(KeyError):
        gain("kid", "lower", OLD, OLD)


def test_conditions_that_belong_to_a_model_may_differ() -> None:
    one = {"count": 50_000, "steps": 250, "seed": 0, "training_steps": 10}
    assert differing(one, one | {"seed": 1, "training_steps": 20, "weights": "raw"}) == []
    assert differing(one, {"count": 10_000, "seed": 0, "eta": 0.0, "steps": 250.0}) == ["count", "eta"]


def test_an_estimate_says_its_interval_if_it_has_one() -> None:
    assert str(Estimate.of("fd", OLD)) == "10 (7 to 13)"
    assert Estimate.of("fd", OLD).margin == 3
    assert str(Estimate.of("recall", OLD)) == "0.5"
    assert Estimate.of("recall", OLD).margin == 0
