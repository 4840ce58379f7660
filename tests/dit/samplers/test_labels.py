"""Classes of samples: by name, by number, and how wrong ones are told."""

import pytest
from pydantic import ValidationError

from dit.samplers.config import SampleConfig
from dit.samplers.labels import class_label, described, sample_labels
from storage.errors import InputError

NAMES = ("cat", "dog", "0", "golden retriever")


@pytest.mark.parametrize(("name", "label"), [("cat", 0), ("golden retriever", 3), ("1", 1), ("3", 3), ("0", 2)])
def test_a_name_comes_before_a_number(name: str, label: int) -> None:
    assert class_label(name, NAMES) == label


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dgo", "did you mean 'dog'?"),
        ("4", "a name or a number from 0 to 3"),
        ("-1", "a name"),
        ("²", "a "),
        ("9" * 5000, "a name or a number from 0 to 3"),
    ],
)
def test_a_class_that_is_none(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"no class '{name}'; .*{hint.replace('?', '.')}"):
        class_label(name, NAMES)


def test_counts_class_after_class_in_any_batches_and_in_whatever_order_they_are_written() -> None:
    counts = {"dog": 3, "cat": 1, "3": 2}
    whole = sample_labels(counts, range(6), 0, NAMES).tolist()
    assert whole == [0, 1, 1, 1, 3, 3]
    other = dict(reversed(counts.items()))
    assert sample_labels(other, range(6), 0, NAMES).tolist() == whole
    assert described(other) == described(counts)
    assert [*sample_labels(counts, range(2), 0, NAMES), *sample_labels(counts, range(2, 6), 0, NAMES)] == whole
    assert described(counts) == "2 x 3, 1 x cat, 3 x dog"


def test_counts_say_how_many_images() -> None:
    config = SampleConfig.model_validate({"labels": {"cat": 3, 7: 2}})
    assert (config.count, config.labels) == (5, {"cat": 3, "7": 2})
    assert SampleConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"cat": 0}, "greater than or equal to 1"),
        ({}, "at least 1 item"),
        ({"cat": "many"}, "valid integer"),
        ("every", "'balanced' or 'random'"),
    ],
)
def test_wrong_counts(labels: object, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        SampleConfig.model_validate({"labels": labels})


def test_a_count_that_is_not_their_sum() -> None:
    with pytest.raises(ValidationError, match="count: 9 images, but the labels are 5; set count to 5"):
        SampleConfig.model_validate({"labels": {"cat": 5}, "count": 9})
