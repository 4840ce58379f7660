"""Every bit of every kind of output counts."""

from pathlib import Path

import pytest
from flips import unnoticed
from small import Small

from flows.report.page import Shown, page_output, write_page
from storage.manifest import Manifest
from storage.seal import opened, sealed
from storage.verify import faults, outputs

STAGES = ("shard", "encode", "train", "sample", "evaluate", "references", "reports")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """An output of each kind, by stage; all that a report shows."""
    root = tmp_path_factory.mktemp("root")
    small = Small(root, tracked=False)
    metrics = small.evaluated(small.checkpoint(small.latents()))
    chain = [output for output in outputs(metrics.uri) if isinstance(output, Manifest)]
    stages = [output for output in reversed(chain) if output.stage != "references"]
    shown = Shown("digits", stages, str(root))
    write_page(shown)
    chain += [Manifest.read(page_output(shown).uri)]
    kept = [Manifest.read(str(path)) for path in sorted((root / "references").iterdir())]
    return {output.stage: output for output in (*kept, *chain)}


def test_an_output_of_each_kind_is_sound(made: dict[str, Manifest]) -> None:
    assert set(made) == set(STAGES)
    assert not any(faults(output, full=True) for output in made.values())


@pytest.mark.parametrize("stage", STAGES)
def test_no_flip_in_a_committed_file_goes_unnoticed(made: dict[str, Manifest], stage: str) -> None:
    assert unnoticed(made[stage], each=20) == []


def test_the_report_is_checked_down_to_the_archive(made: dict[str, Manifest]) -> None:
    chain = [output for output in outputs(made["reports"].uri) if isinstance(output, Manifest)]
    assert {output.stage for output in chain} == set(STAGES)
    assert set(made["shard"].inputs) == {"train", "held_out"}
    path = Path(made["encode"].url)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"sample", b"simple").replace(b"encode", b"decode"))
    assert not all(isinstance(output, Manifest) for output in outputs(made["reports"].uri))
    path.write_bytes(data)


def test_statistics_of_reference_images_may_be_gone_and_not_be_others(made: dict[str, Manifest]) -> None:
    assert {name for name, parent in made["evaluate"].parents.items() if parent.cached} == {"reference", "held_out"}
    path = Path(made["references"].url)
    data = path.read_bytes()
    path.write_bytes(sealed(opened(data).replace(b'"counts": {', b'"counts": {"more": 1,')))
    errors = [str(output) for output in outputs(made["evaluate"].uri) if not isinstance(output, Manifest)]
    assert len(errors) == 1 and "was made from other bytes than its " in errors[0]
    path.unlink()
    assert all(isinstance(output, Manifest) for output in outputs(made["evaluate"].uri))
    path.write_bytes(data)
