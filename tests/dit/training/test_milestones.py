"""Models kept on the way: each is the output of a run with fewer steps."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from forked import Faults, Job, Template
from pydantic import ValidationError

from dit import train
from dit.export import CheckpointManifest
from dit.training import checkpoint
from dit.training.config import TrainConfig
from dit.training.milestones import milestone_steps
from dit.training.step_log import StepLog
from storage.errors import StorageError
from storage.latents import LatentManifest
from storage.manifest import StageOutput, is_finished
from storage.verify import faults

PLAIN = tiny.TRAINING.model_copy(update={"log_every": 4})
CONFIG = PLAIN.model_copy(update={"milestones": (4, 7)})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, latents: LatentManifest) -> CheckpointManifest:
    return tiny.run_train(tmp_path_factory.mktemp("plain"), PLAIN, latents)


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory, latents: LatentManifest) -> dict[int, CheckpointManifest]:
    """Separate runs of so many steps."""
    root = tmp_path_factory.mktemp("shorter")
    return {steps: tiny.run_train(root / str(steps), config_of(steps), latents) for steps in (4, 7)}


def config_of(steps: int) -> TrainConfig:
    return PLAIN.model_copy(update={"steps": steps})


def output(root: Path, steps: int, latents: LatentManifest) -> StageOutput:
    return tiny.output(root, CheckpointManifest, config_of(steps), latents=latents)


def assert_same(found: CheckpointManifest, expected: CheckpointManifest, *, picture: bool = True) -> None:
    """In all that is committed; the picture of the loss has a point for each step that was logged."""
    ours, theirs = tiny.objects(found), tiny.objects(expected)
    names = theirs.keys() - (set() if picture else {"artifacts/loss.png"})
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert (found.digest, found.metrics, found.counts) == (expected.digest, expected.metrics, expected.counts)
    assert not faults(found, full=True)


def test_each_is_the_output_of_a_run_with_so_many_steps_and_changes_no_bit(
    tmp_path: Path, latents: LatentManifest, plain: CheckpointManifest, shorter: dict[int, CheckpointManifest]
) -> None:
    assert_same(tiny.run_train(tmp_path, CONFIG, latents), plain, picture=False)
    for steps, expected in shorter.items():
        assert_same(CheckpointManifest.read(output(tmp_path, steps, latents).uri), expected)


@pytest.mark.parametrize("step", [4, 5, 7, 8, 11])
def test_through_a_kill(
    tmp_path: Path, latents: LatentManifest, shorter: dict[int, CheckpointManifest], step: int
) -> None:
    config = CONFIG.model_copy(update={"log_every": 1, "checkpoint_every": 1})
    with pytest.raises(tiny.Killed):
        tiny.run_train(tmp_path, config, latents, tiny.Killer(step))
    tiny.run_train(tmp_path, config, latents)
    for steps, expected in shorter.items():
        assert_same(CheckpointManifest.read(output(tmp_path, steps, latents).uri), expected, picture=False)


def test_a_kill_between_the_checkpoint_of_a_step_and_its_milestone(
    tmp_path: Path, latents: LatentManifest, shorter: dict[int, CheckpointManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any) -> None:
        raise tiny.Killed

    with monkeypatch.context() as patched, pytest.raises(tiny.Killed):
        patched.setattr(train, "_commit", kill)
        tiny.run_train(tmp_path, CONFIG, latents)
    recorder = tiny.Recorder()
    tiny.run_train(tmp_path, CONFIG, latents, recorder)
    assert min(recorder.values) > 4  # it resumed from the checkpoint of step 4
    for steps, expected in shorter.items():
        assert_same(CheckpointManifest.read(output(tmp_path, steps, latents).uri), expected)


def test_a_milestone_is_skipped_as_a_finished_run_and_not_made_again(
    tmp_path: Path, latents: LatentManifest, shorter: dict[int, CheckpointManifest]
) -> None:
    first = tiny.run_train(tmp_path, config_of(4), latents)
    tiny.run_train(tmp_path, CONFIG, latents)
    assert CheckpointManifest.read(first.uri).created == first.created


def test_a_run_that_finds_its_output_finished_meanwhile_leaves_it_whole(
    tmp_path: Path, latents: LatentManifest, shorter: dict[int, CheckpointManifest]
) -> None:
    """As a run of as many steps does, if its curve has other points."""
    tiny.run_train(tmp_path, CONFIG, latents)
    found = tiny.run_train(tmp_path, config_of(7).model_copy(update={"log_every": 1}), latents)
    assert_same(found, shorter[7])


def test_points_of_the_curve_are_no_content(tmp_path: Path, latents: LatentManifest) -> None:
    one, other = (
        tiny.run_train(tmp_path / str(every), config_of(7).model_copy(update={"log_every": every}), latents)
        for every in (1, 7)
    )
    assert one.read_object("artifacts/loss.png") != other.read_object("artifacts/loss.png")
    assert one.content == other.content


def test_a_run_that_resumes_at_a_milestone_with_nothing_logged_goes_on(
    tmp_path: Path, latents: LatentManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = {"log_every": 100, "checkpoint_every": 3}
    with pytest.raises(tiny.Killed), monkeypatch.context() as patched:
        patched.setattr(StepLog, "write", lambda *_: None)  # as if all steps had been skipped
        patched.setattr(checkpoint.Saver, "check", lambda saver: _kill_after(saver, 3))
        tiny.run_train(tmp_path, PLAIN.model_copy(update=quiet), latents)
    made = tiny.run_train(tmp_path, PLAIN.model_copy(update=quiet | {"milestones": (3,)}), latents)
    assert made.counts["steps"] == 12
    assert not is_finished(output(tmp_path, 3, latents).uri)


def _kill_after(saver: checkpoint.Saver, step: int) -> None:
    if saver._state.step > step:
        saver.wait()
        raise tiny.Killed


def test_a_disk_that_is_full_ends_the_run_with_one_line(
    tmp_path: Path, latents: LatentManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StorageError("the disk is full; make room")

    monkeypatch.setattr(train, "_commit", full)
    with pytest.raises(StorageError, match="the disk is full; make room"):
        tiny.run_train(tmp_path, CONFIG, latents)


def test_milestones_that_lie_behind_are_named(
    tmp_path: Path, latents: LatentManifest, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.run_train(tmp_path, config_of(8), latents)
    tiny.run_train(tmp_path, CONFIG.model_copy(update={"milestones": 2}), latents)
    assert "milestones before step 8, where this run begins, are not made: [2, 4, 6]" in caplog.text
    assert [steps for steps in range(1, 12) if is_finished(output(tmp_path, steps, latents).uri)] == [8, 10]


def test_on_two_ranks_with_sharded_parameters(tmp_path: Path, template: Template, store: LatentManifest) -> None:
    def trained(root: Path, config: TrainConfig, **shape: Any) -> CheckpointManifest:
        out = tiny.output(root, CheckpointManifest, config, latents=store)
        template.finish(Job(out, config, store, **shape))
        return CheckpointManifest.read(out.uri)

    sharded = CONFIG.model_copy(update={"parallel": "fsdp"})
    trained(tmp_path / "long", sharded, ranks=2, faults=Faults([(1, 9)], restarts=1))
    expected = trained(tmp_path / "short", sharded.model_copy(update={"steps": 7, "milestones": None}), ranks=2)
    found = CheckpointManifest.read(output(tmp_path / "long", 7, store).uri)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("milestones", "steps"), [(None, []), (5, [5, 10]), (12, []), ((7, 3, 7, 12, 20), [3, 7]), ((), [])]
)
def test_steps(milestones: int | tuple[int, ...] | None, steps: list[int]) -> None:
    assert milestone_steps(milestones, 12) == steps


def test_a_rate_that_depends_on_the_number_of_steps_is_refused() -> None:
    with pytest.raises(ValidationError, match="milestones: need decay: none; with cosine a run"):
        TrainConfig(decay="cosine", milestones=5)


def test_identity_is_without_them() -> None:
    assert CONFIG.identity() == PLAIN.identity()
