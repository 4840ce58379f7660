"""A sweep whose recipes run at once, in processes of their own."""

import json
import os
import signal
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import refused
from faults import all_gone, descendants
from pipelines import SMALL, ditflow
from until import until

from flows.command.main import main
from flows.command.members import run_members
from flows.recipe import load_recipe
from storage.errors import InputError
from storage.manifest import Manifest

RATES = [0.001, 0.002, 1e15]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Callable[..., Path]:
    """A sweep over learning rates, on a few digits."""

    def write(rates: list[float], **more: object) -> Path:
        small = {key: yaml.safe_load(str(value)) for key, value in SMALL.items()}
        archive = {f"archive.{split}": f"{digits}/{split}" for split in ("train", "held_out")}
        values = {
            "name": "rates",
            "base": "demo",
            "change": small | archive | {"train.max_skipped": 2, "evaluate": None} | more,
            "vary": {"train.learning_rate": rates},
        }
        path = tmp_path_factory.mktemp("sweep") / "rates.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def fresh(tmp_path: Path, migrated: Callable[[Path], None]) -> Path:
    migrated(tmp_path / "root")
    return tmp_path / "root"


def run(sweep: Path, root: Path, *more: str) -> list[str]:
    return ditflow("run", str(sweep), "--root", str(root), "--json", *more)


def weights(root: Path) -> dict[str, object]:
    """The files of every trained model, by its learning rate."""
    made = [Manifest.read(str(path)) for path in root.glob("train/*/manifest.json")]
    assert all(each.config is not None for each in made)
    return {str(each.config["learning_rate"]): each.files for each in made}


@pytest.mark.full
def test_members_share_what_they_can_and_one_that_fails_stops_no_other(
    sweep: Callable[..., Path], fresh: Path, tmp_path: Path, migrated: Callable[[Path], None]
) -> None:
    done = subprocess.run(run(sweep(RATES), fresh, "--parallel", "3"), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "fault: 1 of 3 recipes have failed; the same command runs them again; rates-1000000000000000.0: "
    )
    assert "training diverged" in last
    log = last.rpartition("its log is ")[2]
    assert "training diverged" in Path(log).read_text()
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {report["recipe"] for report in reports} == {"rates-0.001", "rates-0.002"}
    ran = [stage for report in reports for stage in report["stages"] if stage["state"] == "ran"]
    assert sorted(stage["name"] for stage in ran if stage["name"] not in ("shard", "encode", "encode held_out")) == [
        *["register"] * 2,
        *["sample"] * 2,
        *["train"] * 2,
    ]
    assert len(list(fresh.glob("shard/*/manifest.json"))) == 1
    assert len(list(fresh.glob("encode/*/manifest.json"))) == 2  # and of held-out images
    alone = tmp_path / "alone"
    migrated(alone)
    subprocess.run(run(sweep(RATES[:2]), alone), stdout=subprocess.PIPE, check=True)
    assert weights(alone) == weights(fresh)


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_end_of_the_command_ends_its_members_and_after_a_kill_the_same_command_goes_on(
    sweep: Callable[..., Path], fresh: Path, how: signal.Signals, tmp_path: Path, migrated: Callable[[Path], None]
) -> None:
    rates, steps = RATES[:2], {"train.steps": 60}
    command = run(sweep(rates, **steps), fresh, "--parallel", "2")
    first = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    until(lambda: len(list(fresh.glob("train/*/checkpoints/step-*/record.json"))) >= 2, 0.1)
    family = descendants(first.pid)
    os.kill(first.pid, how)
    assert first.wait() == {signal.SIGINT: 130}.get(how, -how)
    until(lambda: all_gone(family), 0.1)
    if how != signal.SIGKILL:  # what is left after it is the least
        return
    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert [set(json.loads(line)) >= {"recipe", "stages"} for line in again.stdout.splitlines()] == [True, True]
    assert [path.name for path in (fresh / "running").iterdir()] == []
    alone = tmp_path / "alone"
    migrated(alone)
    subprocess.run(run(sweep(rates, **steps), alone), stdout=subprocess.PIPE, check=True)
    assert weights(alone) == weights(fresh)


def test_what_makes_no_sense_is_refused(
    sweep: Callable[..., Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = 'launch={kind: nodes, address: "here:29500"}'
    given = ["run", str(sweep(RATES)), "--root", str(root)]
    assert "all nodes of launch.kind" in refused(capsys, [*given, "--parallel", "2", "--set", nodes])
    assert "--queue: is one of a work pool" in refused(capsys, [*given, "--queue", "urgent"])
    assert "--pool: no Prefect server runs" in refused(capsys, [*given, "--pool", "gpu"])
    assert "--force: each look at the pool would begin anew" in refused(capsys, [*given, "--pool", "gpu", "--force"])
    assert "--parallel: a work pool has limits" in refused(capsys, [*given, "--pool", "gpu", "--parallel", "2"])


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--parallel", "0", "0: must be a whole number of 1 or more"),
        ("--parallel", "two", "two: must be a whole number of 1 or more"),
        ("--patience", "long", "long: must be a number of at least 0"),
        ("--patience", "nan", "nan: must be a number of at least 0"),
    ],
)
def test_a_value_that_is_no_number_is_told_in_words(
    capsys: pytest.CaptureFixture[str], option: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "demo", option, value])
    assert f"{option}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(("parallel", "gpus"), [(2, 2), (4, 1), (8, 1)])
def test_more_ranks_than_the_gpus_of_a_part_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: int, gpus: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    recipe = load_recipe("demo", ["launch.nproc=3"])
    said = f"launch.nproc is 3, and --parallel leaves {gpus} GPUs to each recipe; set it to 0"
    with pytest.raises(InputError, match=said):
        run_members([recipe] * 4, Namespace(parallel=parallel, root=str(tmp_path)))
    with pytest.raises(InputError, match="leaves 2 GPUs to each"):  # two recipes divide the whole machine
        run_members([recipe] * 2, Namespace(parallel=parallel, root=str(tmp_path)))
