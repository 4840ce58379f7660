"""Every stage, killed again and again as it opens, renames or removes a file."""

import hashlib
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from forked import Faults, Job, Template

from dit.evaluate import EvaluateConfig, MetricsManifest
from dit.export import CheckpointManifest
from dit.sample import SampleManifest
from dit.vae import VaeRef
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef
from storage.latents import LatentManifest
from storage.manifest import stage_output
from storage.shards import shard
from storage.shards.runners import Local
from storage.shards.shard import ShardConfig, ShardManifest

MakeJob = Callable[[Path], Job]
SEED = 4


@pytest.fixture
def jobs(
    pictures: Path,
    vae: VaeRef,
    shards: ShardManifest,
    latents: LatentManifest,
    checkpoint: CheckpointManifest,
    samples: SampleManifest,
    judge: EvaluateConfig,
) -> dict[str, MakeJob]:
    """Each stage in a root."""

    def make_shards(root: Path) -> Job:
        archive = ArchiveRef(train=str(pictures / "train"), held_out=str(pictures / "held_out"))
        config = ShardConfig(images_per_shard=2, runner=Local(count=2))
        inputs = input_digests(archive)
        out = stage_output(str(root), shard.STAGE, shard.VERSION, config, parents={}, inputs=inputs)
        return Job(out, config, archive, ranks=1)

    def encode(root: Path) -> Job:
        config = tiny.encode_config(vae)
        return Job(tiny.output(root, LatentManifest, config, shards=shards), config, shards, ranks=1)

    def train(root: Path) -> Job:
        return Job(tiny.output(root, CheckpointManifest, tiny.TRAINING, latents=latents), tiny.TRAINING, latents, 1)

    def sample(root: Path) -> Job:
        out = tiny.output(root, SampleManifest, tiny.SAMPLING, checkpoint=checkpoint)
        return Job(out, tiny.SAMPLING, checkpoint, ranks=1)

    def evaluate(root: Path) -> Job:
        return Job(tiny.output(root, MetricsManifest, judge, samples=samples), judge, samples, ranks=1)

    return {"shard": make_shards, "encode": encode, "train": train, "sample": sample, "evaluate": evaluate}


def contents(root: Path) -> dict[str, object]:
    """The hash of every file; a manifest without when and where it was made. A kill may leave temporary files."""
    found: dict[str, object] = {}
    for path in root.rglob("*"):
        if path.name == "manifest.json":
            values = json.loads(path.read_text().replace(str(root), "ROOT"))
            found[str(path.relative_to(root))] = {
                key: value for key, value in values.items() if key not in ("created", "sha256")
            }
        elif path.is_file() and not (path.name.startswith(".") and path.suffix == ".tmp"):
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.full)])
@pytest.mark.parametrize("stage", ["shard", "encode", "train", "sample", "evaluate"])
def test_what_is_made_through_kills_is_what_an_undisturbed_run_makes(
    tmp_path: Path, template: Template, jobs: dict[str, MakeJob], stage: str, kills: int
) -> None:
    events = template.finish(jobs[stage](tmp_path / "calm")).events
    calm, rng, killed = contents(tmp_path / "calm"), random.Random(SEED), 0
    assert events > 10
    while killed < kills:
        root, code = tmp_path / str(killed), -1
        while code:
            job = jobs[stage](root)._replace(faults=Faults(event=rng.randint(1, events)))
            ended = template.run(job)
            ((code,),) = ended.codes
            assert code in (0, -signal.SIGKILL), ended.errors
            killed += code != 0
        assert contents(root) == calm
