"""Parameters dealt among ranks: the same weights as copies give, through kills and from one way to another."""

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forked import Faults, Job, Template
from safetensors.torch import load

from dit.export import CheckpointManifest
from dit.training.config import TrainConfig
from storage.latents import LatentManifest

RANKS = 2
CONFIG = tiny.TRAINING.model_copy(
    update={
        "steps": 20,
        "learning_rate": 1e-3,
        "gradient_clip": 0.5,
        "micro_batch": 2,
        "ema_decays": (0.9,),
        "keep_checkpoints": 9,
        "sample_every": 20,
    }
)
SPOILT = Faults(spoilt=[(1, 6)])


def job(root: Path, store: LatentManifest, config: TrainConfig, **shape: Any) -> Job:
    out = tiny.output(root, CheckpointManifest, config, latents=store)
    return Job(out, config, store, **{"ranks": RANKS, "faults": SPOILT} | shape)


def trained(template: Template, job: Job) -> CheckpointManifest:
    template.finish(job)
    return CheckpointManifest.read(job.out.uri)


@pytest.fixture(scope="module")
def copies(template: Template, tmp_path_factory: pytest.TempPathFactory, store: LatentManifest) -> CheckpointManifest:
    return trained(template, job(tmp_path_factory.mktemp("ddp"), store, CONFIG))


def like(parallel: str) -> TrainConfig:
    return CONFIG.model_copy(update={"parallel": parallel})


@pytest.fixture(scope="module")
def parts(template: Template, tmp_path_factory: pytest.TempPathFactory, store: LatentManifest) -> CheckpointManifest:
    return trained(template, job(tmp_path_factory.mktemp("fsdp"), store, like("fsdp")))


@dataclass(frozen=True)
class Kept:
    """What a run has made; the files may be written again."""

    weights: dict[str, dict[str, torch.Tensor]]
    manifest: CheckpointManifest


def kept(manifest: CheckpointManifest) -> Kept:
    return Kept({name: load(manifest.read_object(name)) for name in manifest.card.weights}, manifest)


def assert_near(found: Kept, expected: Kept) -> None:
    """All weights within 1e-5, a hundredth of a step of Adam."""
    assert found.manifest.digest == expected.manifest.digest
    assert found.manifest.metrics == pytest.approx(expected.manifest.metrics, rel=1e-4)
    for name, tensors in found.weights.items():
        assert tensors.keys() == expected.weights[name].keys()
        for each, tensor in tensors.items():
            pairs = [(tensor, expected.weights[name][each])]
            if each.endswith("qkv.bias"):  # the keys' has no gradient but rounding, of which Adam makes whole steps
                pairs = [pair for n, pair in enumerate(zip(*(x.chunk(3) for x in pairs[0]), strict=True)) if n != 1]
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_parts_train_as_copies_do(copies: CheckpointManifest, parts: CheckpointManifest) -> None:
    """With micro-batches, clipped gradients and a step that one rank spoils."""
    assert_near(kept(parts), kept(copies))


@pytest.mark.full
def test_parts_within_each_of_two_machines_train_as_copies_do(
    tmp_path: Path, template: Template, store: LatentManifest, copies: CheckpointManifest
) -> None:
    config = like("hsdp").model_copy(update={"micro_batch": 1})
    assert_near(kept(trained(template, job(tmp_path, store, config, ranks=4, machine=2))), kept(copies))


def test_parts_go_on_in_the_same_bits_after_a_kill_and_as_copies(
    tmp_path: Path, template: Template, store: LatentManifest, parts: CheckpointManifest
) -> None:
    faults = replace(SPOILT, kills=[(0, 18)], restarts=1)
    killed = trained(template, job(tmp_path, store, like("fsdp"), faults=faults))
    assert tiny.objects(killed) == tiny.objects(parts)
    (step,) = (Path(killed.uri) / "checkpoints").glob("step-000000016")
    files = {path.name: set(load(path.read_bytes())) for path in step.glob("*.safetensors")}
    counters, first, second = (files[f"state-0000{name}.safetensors"] for name in ("0-000", "0-001", "1-000"))
    assert first == second
    assert len(files) == 3
    assert {name.rpartition(".")[2] for name in counters} == {"step"}
    Path(killed.url).unlink()
    shutil.rmtree(step.with_name("step-000000020"))
    recorder = tiny.Recorder()
    alone = tiny.run_train(tmp_path, CONFIG, store, recorder)
    assert list(recorder.values) == [17, 18, 19, 20]
    assert_near(kept(alone), kept(parts))


@pytest.mark.parametrize(
    ("parallel", "count", "machine"), [("fsdp", 2, 2), pytest.param("hsdp", 4, 2, marks=pytest.mark.full)]
)
def test_a_part_that_is_damaged_takes_all_ranks_one_checkpoint_back(
    tmp_path: Path,
    template: Template,
    store: LatentManifest,
    parts: CheckpointManifest,
    parallel: str,
    count: int,
    machine: int,
) -> None:
    """Whichever rank reads it, also when they go on as parts of two machines."""
    shutil.copytree(Path(parts.uri), tmp_path / "train" / Path(parts.uri).name)
    (manifest,) = tmp_path.rglob("manifest.json")
    manifest.unlink()
    (part,) = tmp_path.rglob("step-000000016/state-00001-000.safetensors")
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    (record,) = tmp_path.rglob("step-000000012/record.json")
    before = record.stat().st_mtime_ns
    again = job(tmp_path, store, like(parallel), ranks=count, machine=machine)
    assert_near(kept(trained(template, again)), kept(parts))
    assert record.stat().st_mtime_ns == before
    assert len(list(tmp_path.rglob("step-000000016/*.safetensors"))) == 3


def test_a_full_disk_of_one_rank_is_named(tmp_path: Path, template: Template, store: LatentManifest) -> None:
    ended = template.run(job(tmp_path, store, like("fsdp"), faults=Faults(full=(1, 6))))
    assert ended.codes == [[1, 1]]
    line = "storage.errors.StorageError: .*step-000000008/state-00001-000.safetensors: the disk is full"
    assert re.search(line, ended.errors)  # by all ranks, or the others lose the first that knows in a collective
    assert [path.parent.name for path in tmp_path.rglob("record.json")] == ["step-000000004"]


def test_copies_go_on_as_parts(tmp_path: Path, template: Template, store: LatentManifest) -> None:
    """Whose blocks are gone through twice."""
    alone = kept(tiny.run_train(tmp_path, CONFIG, store))
    Path(alone.manifest.url).unlink()
    config = like("fsdp").model_copy(update={"checkpoint_activations": True})
    assert_near(kept(trained(template, job(tmp_path, store, config, faults=Faults()))), alone)
