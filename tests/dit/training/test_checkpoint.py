import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load
from torch import nn
from until import LIMIT

from dit.export import CheckpointManifest
from dit.ranks import Ranks
from dit.training import checkpoint, checkpoint_files
from dit.training.checkpoint import Saver
from dit.training.ema import EMA
from dit.training.loop import TrainState
from dit.training.throughput import LoggedStep
from storage import uri
from storage.errors import StorageError
from storage.header import FileEntry, Parent
from storage.manifest import StageOutput
from storage.seal import opened

STATE = "state-00000-000.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> StageOutput:
    return tiny.output(tmp_path, CheckpointManifest, tiny.TRAINING)


def fresh(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_parameter("fixed", nn.Parameter(torch.randn(2), requires_grad=False))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    averages = {"ema": EMA(model, 0.9), "ema-0.5": EMA(model, 0.5)}
    return TrainState(model, averages, torch.optim.AdamW(trained, 1e-2, fused=True))


def advance(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(state.step))
        state.model(x).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        for average in state.averages.values():
            average.update(state.model, state.step)
        state.step += 1


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    for which, average in state.averages.items():
        found |= {f"{which}.{name}": value for name, value in average.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": value for name, value in slots.items()}
    return {name: value.clone() for name, value in found.items()}


def assert_same(state: TrainState, expected: dict[str, torch.Tensor]) -> None:
    found = tensors(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def save(out: StageOutput, state: TrainState, history: Sequence[LoggedStep] = (), **keep: Any) -> None:
    saver = Saver(out, state, Ranks(), **{"keep": 9} | keep)
    saver.save(history)
    saver.wait()


def saved(
    out: StageOutput, steps: tuple[int, ...], keep: int = 9, keep_every: int | None = None
) -> dict[int, dict[str, torch.Tensor]]:
    """Checkpoints at these steps, and what each holds."""
    state, history, held = fresh(), list[LoggedStep](), {}
    for step in steps:
        advance(state, step - state.step)
        history.append(LoggedStep(step=step, values={"loss": 1 / (3 * step)}))
        save(out, state, history, keep=keep, keep_every=keep_every)
        held[step] = tensors(state)
    return held


def kept(out: StageOutput) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in Path(out.url("checkpoints")).iterdir())


def folder(out: StageOutput, step: int) -> Path:
    return Path(out.url("checkpoints", f"step-{step:09d}"))


def test_all_that_changes_comes_back(out: StageOutput) -> None:
    held = saved(out, (3, 5))
    state = fresh(seed=1)
    history = checkpoint.load_newest([out], state, Ranks())
    assert state.step == 5
    assert_same(state, held[5])
    assert [(measured.step, measured.values) for measured in history] == [(3, {"loss": 1 / 9}), (5, {"loss": 1 / 15})]


def test_training_goes_on_as_if_nothing_had_happened(out: StageOutput) -> None:
    saved(out, (4,))
    through, resumed = fresh(), fresh(seed=1)
    advance(through, 9)
    checkpoint.load_newest([out], resumed, Ranks())
    advance(resumed, 5)
    assert_same(resumed, tensors(through))


def test_without_checkpoints_nothing_changes(out: StageOutput) -> None:
    state = fresh()
    before = tensors(state)
    assert checkpoint.load_newest([out], state, Ranks()) == []
    assert state.step == 0
    assert_same(state, before)


def no_record(folder: Path) -> None:
    (folder / "record.json").unlink()


def broken_record(folder: Path) -> None:
    (folder / "record.json").write_text('{"step": 6')


def other_record(folder: Path) -> None:
    path = folder / "record.json"
    path.write_bytes(path.read_bytes().replace(b'"step":6', b'"step":7'))


def other_loss(folder: Path) -> None:
    path = folder / "record.json"
    path.write_bytes(path.read_bytes().replace(b'"loss":0.', b'"loss":1.', 1))


def no_state(folder: Path) -> None:
    (folder / STATE).unlink()


def short_state(folder: Path) -> None:
    data = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(data[: len(data) // 2])


def flipped_bit(folder: Path) -> None:
    data = bytearray((folder / STATE).read_bytes())
    data[-3] ^= 1
    (folder / STATE).write_bytes(data)


@pytest.mark.parametrize(
    "fault", [no_record, broken_record, other_record, other_loss, no_state, short_state, flipped_bit]
)
def test_a_broken_checkpoint_gives_way_to_the_one_before(
    out: StageOutput, fault: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    held = saved(out, (2, 4, 6))
    fault(folder(out, 6))
    state = fresh(seed=1)
    with caplog.at_level(logging.WARNING):
        history = checkpoint.load_newest([out], state, Ranks())
    assert (state.step, [measured.step for measured in history]) == (4, [2, 4])
    assert_same(state, held[4])
    assert "step-000000006: checkpoint incomplete, damaged, removed or of other latents" in caplog.text
    advance(state, 2)
    save(out, state, history)
    again = fresh(seed=2)
    checkpoint.load_newest([out], again, Ranks())
    assert again.step == 6
    assert_same(again, held[6])


@pytest.mark.parametrize("gone", ["record.json", STATE])
def test_a_checkpoint_that_another_command_removes_gives_way_to_its_newer_one(
    out: StageOutput, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Whether the record or the state is gone when it is read, and also if all that were listed are."""
    held = saved(out, (2, 4))
    read = uri.read_if_there

    def removed_before(url: str) -> bytes | None:
        if url.endswith(f"step-000000004/{gone}"):
            monkeypatch.setattr(uri, "read_if_there", read)
            held.update(saved(out, (6, 8), keep=1))
        return read(url)

    monkeypatch.setattr(uri, "read_if_there", removed_before)
    state = fresh(seed=1)
    history = checkpoint.load_newest([out], state, Ranks())
    assert (state.step, [measured.step for measured in history]) == (8, [6, 8])
    assert_same(state, held[8])


def test_a_checkpoint_that_another_command_removes_is_no_fault(
    out: StageOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(out, (2, 4, 6))
    rm = LocalFileSystem.rm

    def removed_by_both(fs: LocalFileSystem, path: str, **how: Any) -> None:
        rm(fs, path, **how)
        rm(fs, path, **how)

    monkeypatch.setattr(LocalFileSystem, "rm", removed_by_both)
    checkpoint.prune(out, 6, keep=1, keep_every=None)
    assert kept(out) == [6]


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(out: StageOutput) -> None:
    saved(out, (2, 4))
    record = folder(out, 4) / "record.json"
    record.unlink()
    record.mkdir()
    with pytest.raises(StorageError, match=r"record\.json: cannot be read"):
        checkpoint.load_newest([out], fresh(), Ranks())


def test_a_checkpoint_of_an_earlier_version_is_not_passed_over(out: StageOutput) -> None:
    saved(out, (2,))
    record = folder(out, 2) / "record.json"
    record.write_bytes(opened(record.read_bytes()))
    with pytest.raises(StorageError, match=r"record\.json: written by another version of ditflow; resume with that"):
        checkpoint.load_newest([out], fresh(), Ranks())


def test_a_checkpoint_of_other_latents_is_not_resumed_from(out: StageOutput) -> None:
    saved(out, (2,))
    made_again = Parent(digest="0" * 64, uri="/latents", content="1" * 64)
    header = out.header.model_copy(update={"parents": {"latents": made_again}})
    state = fresh(seed=1)
    checkpoint.load_newest([out.model_copy(update={"header": header})], state, Ranks())
    assert state.step == 0


def test_the_newest_stay(out: StageOutput) -> None:
    saved(out, (1, 2, 3, 4, 5), keep=2)
    assert kept(out) == [4, 5]


def test_every_so_manieth_stays_too(out: StageOutput) -> None:
    saved(out, tuple(range(1, 12)), keep=2, keep_every=4)
    assert kept(out) == [4, 8, 10, 11]


def test_what_kills_left_is_removed(out: StageOutput) -> None:
    """Such as are newer than the one that was loaded, and those that never had a record."""
    saved(out, (2, 4, 6, 8))
    no_record(folder(out, 2))
    flipped_bit(folder(out, 6))
    no_state(folder(out, 8))
    state = fresh()
    checkpoint.load_newest([out], state, Ranks())
    checkpoint.clean(out, state.step)
    assert kept(out) == [4]


class Held:
    """Keeps files from being written until it is let go."""

    def __init__(self, out: StageOutput, monkeypatch: pytest.MonkeyPatch, fault: Exception | None = None) -> None:
        self.go = threading.Semaphore(0)
        put = StageOutput.put

        def held(stage: StageOutput, path: str, data: bytes) -> FileEntry:
            assert self.go.acquire(timeout=LIMIT)
            if fault:
                raise fault
            return put(stage, path, data)

        monkeypatch.setattr(StageOutput, "put", held)


def test_what_is_saved_does_not_change_with_the_state(out: StageOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    state, held = fresh(), Held(out, monkeypatch)
    advance(state, 2)
    expected = tensors(state)
    saver = Saver(out, state, Ranks(), keep=1)
    saver.save([])
    advance(state, 1)
    saver.check()
    held.go.release()
    saver.wait()
    found = fresh(seed=1)
    checkpoint.load_newest([out], found, Ranks())
    assert found.step == 2
    assert_same(found, expected)


def test_one_checkpoint_waits_for_the_one_before(out: StageOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    state, held = fresh(), Held(out, monkeypatch)
    saver = Saver(out, state, Ranks(), keep=9)
    advance(state, 1)
    saver.save([])
    wait = Saver.wait

    def released(saver: Saver) -> None:
        held.go.release()
        wait(saver)

    monkeypatch.setattr(Saver, "wait", released)
    advance(state, 1)
    saver.save([])
    assert kept(out) == [1]
    saver.wait()
    assert kept(out) == [1, 2]


def test_what_saving_raises_comes_up_at_the_next_look(out: StageOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    state, held = fresh(), Held(out, monkeypatch, StorageError("the disk is full"))
    with closing(Saver(out, state, Ranks(), keep=9)) as saver:
        advance(state, 1)
        saver.save([])
        saver.check()
        held.go.release()
        saver.close()
        with pytest.raises(StorageError, match="the disk is full"):
            saver.check()
        saver.wait()
    assert checkpoint.load_newest([out], fresh(), Ranks()) == []


def test_large_states_take_several_files(out: StageOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "FILE_BYTES", 100)
    held = saved(out, (3,))
    files = sorted(folder(out, 3).glob("*.safetensors"))
    assert len(files) > 3
    loaded = [load(path.read_bytes()) for path in files]
    assert all(len(each) == 1 or sum(tensor.nbytes for tensor in each.values()) <= 100 for each in loaded)
    assert sum(map(len, loaded)) == len(held[3])
    found = fresh(seed=1)
    checkpoint.load_newest([out], found, Ranks())
    assert_same(found, held[3])


def test_a_later_leftover_does_not_push_out_the_only_good_one(out: StageOutput) -> None:
    saved(out, (2, 6))
    no_record(folder(out, 6))
    state = fresh()
    history = checkpoint.load_newest([out], state, Ranks())
    advance(state, 2)
    save(out, state, history, keep=1)
    assert kept(out) == [4, 6]
    found = fresh(seed=1)
    checkpoint.load_newest([out], found, Ranks())
    assert found.step == 4
    assert_same(found, tensors(state))


def test_checkpoints_behind_a_symbolic_link_are_not_removed(out: StageOutput, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs" / "step-000000009"
    theirs.mkdir(parents=True)
    (theirs / "state").touch()
    Path(out.uri).mkdir(parents=True)
    Path(out.uri, "checkpoints").symlink_to(theirs.parent)
    with pytest.raises(StorageError, match="checkpoints: a symbolic link to .*theirs, and nothing is removed"):
        checkpoint.clean(out, 0)
    assert (theirs / "state").exists()
