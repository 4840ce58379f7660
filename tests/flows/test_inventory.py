"""What people may call the input of a stage, and how a wrong name is refused."""

from pathlib import Path

import pytest
from outputs import Value, made, planned

from flows.command.options import check_source
from flows.contract import STAGES
from flows.inventory import input_of
from storage.errors import InputError
from storage.header import Provenance
from storage.manifest import Manifest, stage_output

DEMO, OTHER = "demo-00000001", "other-00000002"


class Split(Value):
    split: str = "train"


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}"


def encoded(root: str, split: str, value: int = 0) -> Manifest:
    config, provenance = Split(split=split, value=value), Provenance(pipeline_id=DEMO)
    return made(stage_output(root, "encode", 1, config, parents={}, inputs={}, provenance=provenance))


def test_a_recipe_names_its_newest_output_of_the_stage_before(root: str) -> None:
    first = made(planned(root, "train", 1, DEMO))
    assert input_of(STAGES["sample"], "demo", root) == first.uri
    newest = made(planned(root, "train", 2, "demo-00000009"))
    average = made(planned(root, "average", 3, DEMO, checkpoint=newest))
    other = made(planned(root, "train", 4, OTHER))
    samples = made(planned(root, "sample", 5, DEMO, checkpoint=newest))
    names = {
        "demo": newest,
        DEMO: first,
        "demo/average": average,
        "other": other,
        "latest": other,
        "latest/average": average,
        first.digest[:6]: first,
        f"train/{first.digest[:6]}": first,
        first.url: first,
        first.uri: first,
    }
    for name, expected in names.items():
        assert input_of(STAGES["sample"], name, root) in (expected.uri, expected.url), name
    assert input_of(STAGES["evaluate"], "demo", root) == samples.uri


def test_held_out_latents_are_not_what_a_recipe_trains_on(root: str) -> None:
    trained_on = encoded(root, "train")
    encoded(root, "held_out")
    assert input_of(STAGES["train"], "demo", root) == input_of(STAGES["train"], "latest", root) == trained_on.uri


def test_samples_are_registered_where_nothing_is_evaluated(root: str) -> None:
    samples = made(planned(root, "sample", 1, DEMO))
    assert input_of(STAGES["register"], "demo", root) == samples.uri
    metrics = made(planned(root, "evaluate", 1, DEMO, samples=samples))
    made(planned(root, "sample", 2, DEMO))
    assert input_of(STAGES["register"], "demo", root) == metrics.uri


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("demoo", "checkpoint: demoo: neither a recipe with outputs nor another output in {}; did you mean demo?"),
        ("zzz", "checkpoint: zzz: neither a recipe with outputs nor another output in {}; `ditflow ls` lists them"),
        ("demo", "checkpoint: demo: no finished train in {} yet; run it first"),
        ("latest", "checkpoint: latest: no finished train in {} yet; run it first"),
        ("demo/average", "checkpoint: demo/average: no finished average in {} yet; run it first"),
        ("runs/train/0123", "checkpoint: runs/train/0123: neither a recipe with outputs nor another output in {}"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(name: str, said: str, root: str) -> None:
    made(planned(root, "encode", 1, DEMO))
    planned(root, "train", 2, DEMO).begin()
    with pytest.raises(InputError) as caught:
        input_of(STAGES["sample"], name, root)
    assert str(caught.value).startswith(said.format(root))
    assert "\n" not in str(caught.value)


def test_an_output_of_another_stage_is_refused(root: str) -> None:
    latents = made(planned(root, "encode", 1, DEMO))
    place = check_source(STAGES["sample"], latents.digest[:8], root)
    with pytest.raises(InputError, match="an output of 'encode'; one of 'train' is needed"):
        STAGES["sample"].source(place)
    assert check_source(STAGES["sample"], "models:/demo@champion", root) == "models:/demo@champion"
