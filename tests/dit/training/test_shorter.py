"""A run of more steps goes on from a finished one, and ends in the bits of a run from step 0."""

import hashlib
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
from forked import Faults, Job, Template

from dit.export import CheckpointManifest
from dit.training.config import TrainConfig
from dit.training.shorter import newest_step, shorter_runs, warn_of_other_batch_sizes
from storage.latents import LatentManifest
from storage.manifest import MANIFEST

LONG = tiny.TRAINING
SHORT = LONG.model_copy(update={"steps": 6})


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, latents: LatentManifest
) -> tuple[tiny.Recorder, CheckpointManifest]:
    return through(tmp_path_factory.mktemp("whole"), LONG, latents)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, latents: LatentManifest) -> Path:
    """A root with the run of six steps."""
    root = tmp_path_factory.mktemp("finished")
    tiny.run_train(root, SHORT, latents)
    return root


@pytest.fixture
def begun(tmp_path: Path, finished: Path) -> Path:
    """A copy of the root with the run of six steps."""
    return Path(shutil.copytree(finished, tmp_path / "root"))


def through(root: Path, config: TrainConfig, latents: LatentManifest) -> tuple[tiny.Recorder, CheckpointManifest]:
    recorder = tiny.Recorder()
    return recorder, tiny.run_train(root, config, latents, recorder)


def trained_steps(recorder: tiny.Recorder) -> list[int]:
    return [done for done, _, _ in recorder.steps]


def hashes(root: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def test_twice_as_many_steps_are_the_bits_of_as_many_at_once(
    begun: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    before = hashes(begun)
    recorder, manifest = through(begun, LONG, latents)
    assert trained_steps(recorder) == list(range(7, 13))
    assert tiny.objects(manifest) == tiny.objects(whole[1])
    assert manifest.metrics == whole[1].metrics
    assert before.items() <= hashes(begun).items()


def test_the_curve_of_the_longer_run_is_whole(
    begun: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    recorder, _ = through(begun, LONG, latents)
    assert list(recorder.values) == list(range(1, 13))
    for step, values in recorder.values.items():
        assert values.items() <= whole[0].values[step].items()
        assert "loss" in values


@pytest.mark.parametrize(("when", "first"), [(7, 7), (9, 9)])
def test_through_a_kill(
    begun: Path,
    latents: LatentManifest,
    whole: tuple[tiny.Recorder, CheckpointManifest],
    when: int,
    first: int,
) -> None:
    """Before and after the longer run has a checkpoint of its own."""
    with pytest.raises(tiny.Killed):
        tiny.run_train(begun, LONG, latents, tiny.Killer(when))
    recorder, manifest = through(begun, LONG, latents)
    assert trained_steps(recorder)[0] == first
    assert tiny.objects(manifest) == tiny.objects(whole[1])


def test_a_checkpoint_that_a_kill_left_incomplete_costs_no_steps(
    begun: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    out = tiny.output(begun, CheckpointManifest, LONG, latents=latents)
    Path(out.url("checkpoints", "step-000000008")).mkdir(parents=True)
    Path(out.url("checkpoints", "step-000000008", "state-00000-000.safetensors")).write_bytes(b"half")
    recorder, manifest = through(begun, LONG, latents)
    assert trained_steps(recorder)[0] == 7
    assert list(recorder.values) == list(range(1, 13))
    assert tiny.objects(manifest) == tiny.objects(whole[1])


def test_a_damaged_checkpoint_costs_steps_but_no_bits(
    begun: Path, latents: LatentManifest, whole: tuple[tiny.Recorder, CheckpointManifest]
) -> None:
    (state,) = begun.rglob("step-000000006/state-00000-000.safetensors")
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    recorder, manifest = through(begun, LONG, latents)
    assert trained_steps(recorder)[0] == 5
    assert tiny.objects(manifest) == tiny.objects(whole[1])


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"learning_rate": 1e-3}, {"ema_decays": (0.25,)}, {"steps": 5}, {"steps": 6}]
)
def test_only_runs_that_differ_in_fewer_steps_alone(
    begun: Path, latents: LatentManifest, changed: dict[str, Any]
) -> None:
    config = LONG.model_copy(update=changed)
    out = tiny.output(begun, CheckpointManifest, config, latents=latents)
    found = shorter_runs(out, config, decay=config.decay)
    assert found == []


def test_operational_fields_may_differ(begun: Path, latents: LatentManifest) -> None:
    config = LONG.model_copy(update={"micro_batch": 2, "log_every": 3, "keep_checkpoints": 7})
    (found,) = shorter_runs(tiny.output(begun, CheckpointManifest, config, latents=latents), config, decay="none")
    assert newest_step(found) == 6


def test_other_files_beside_checkpoints_are_none(begun: Path, latents: LatentManifest) -> None:
    out = tiny.output(begun, CheckpointManifest, SHORT, latents=latents)
    Path(out.url("checkpoints", ".DS_Store")).touch()
    assert newest_step(out) == 6


def test_a_rate_that_depends_on_the_number_of_steps_is_said(
    tmp_path: Path, latents: LatentManifest, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = (config.model_copy(update={"decay": "cosine"}) for config in (SHORT, LONG))
    tiny.run_train(tmp_path, short, latents)
    recorder, _ = through(tmp_path, long, latents)
    assert trained_steps(recorder)[0] == 1
    assert "train.decay: cosine ends at the last step, so a run of more steps begins at step 0" in caplog.text


def test_a_forced_repetition_does_all_its_work_again(begun: Path, latents: LatentManifest) -> None:
    out = tiny.output(begun, CheckpointManifest, LONG, latents=latents)
    forced = out.model_copy(update={"header": out.header.model_copy(update={"rerun": 1})})
    assert shorter_runs(out, LONG, decay="none")
    assert shorter_runs(forced, LONG, decay="none") == []


def test_a_run_on_other_bytes_of_the_latents_is_another_one(begun: Path, latents: LatentManifest) -> None:
    out = tiny.output(begun, CheckpointManifest, LONG, latents=latents)
    again = out.header.parents["latents"].model_copy(update={"content": "0" * 64})
    other = out.model_copy(update={"header": out.header.model_copy(update={"parents": {"latents": again}})})
    assert shorter_runs(other, LONG, decay="none") == []


def test_a_manifest_that_cannot_be_read_is_named(
    begun: Path, latents: LatentManifest, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = begun.rglob(MANIFEST)
    path.write_bytes(path.read_bytes()[:-9])
    out = tiny.output(begun, CheckpointManifest, LONG, latents=latents)
    assert shorter_runs(out, LONG, decay="none") == []
    assert str(path.parent) in caplog.text


@pytest.mark.parametrize("killed", [False, True])
def test_another_batch_size_is_another_run_and_says_so(
    tmp_path: Path, latents: LatentManifest, caplog: pytest.LogCaptureFixture, killed: bool
) -> None:
    """A run that was killed has no manifest, and is found as well."""
    tracker = tiny.Killer(5) if killed else None
    with pytest.raises(tiny.Killed) if killed else nullcontext():
        tiny.run_train(tmp_path, SHORT, latents, tracker)
    there = tiny.output(tmp_path, CheckpointManifest, SHORT, latents=latents).uri
    recorder, _ = through(tmp_path, SHORT.model_copy(update={"batch_size": 6}), latents)
    assert trained_steps(recorder)[0] == 1
    said = f"train.batch_size: another one is another run, so this one begins at step 0; {there} has 8"
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [said]


@pytest.mark.parametrize("changed", [{}, {"seed": 1, "batch_size": 6}])
def test_nothing_is_said_of_batch_sizes_where_none_or_more_differs(
    begun: Path, latents: LatentManifest, caplog: pytest.LogCaptureFixture, changed: dict[str, Any]
) -> None:
    config = SHORT.model_copy(update=changed)
    warn_of_other_batch_sizes(tiny.output(begun, CheckpointManifest, config, latents=latents), config)
    assert caplog.text == ""


def test_on_two_ranks_through_a_kill(tmp_path: Path, template: Template, store: LatentManifest) -> None:
    def trained(root: Path, config: TrainConfig, **shape: Any) -> CheckpointManifest:
        out = tiny.output(root, CheckpointManifest, config, latents=store)
        template.finish(Job(out, config, store, **shape))
        return CheckpointManifest.read(out.uri)

    trained(tmp_path / "short", SHORT, ranks=2)
    shorter = trained(tmp_path / "short", LONG, ranks=2, faults=Faults([(1, 9)], restarts=1))
    assert tiny.objects(shorter) == tiny.objects(trained(tmp_path / "calm", LONG, ranks=2))
