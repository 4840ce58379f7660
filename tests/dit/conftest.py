from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import synthetic
import tiny
import torch
from forked import Template
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits

from dit.evaluate import EvaluateConfig
from dit.export import CheckpointManifest
from dit.metrics.extractors.demo_digits import DigitsClassifier
from dit.metrics.extractors.load import ExtractorRef
from dit.sample import SampleManifest
from dit.vae import VaeRef
from storage.archives.known import input_digests
from storage.archives.open import ArchiveRef
from storage.latents import LatentManifest
from storage.manifest import stage_output
from storage.shards import shard
from storage.shards.runners import Local
from storage.shards.shard import ShardConfig, ShardManifest
from storage.tracker import NullTracker


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs of what is compiled in the test, which are then run as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    return graphs


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    """Where ranks come from."""
    process = Template(lambda: tmp_path_factory.mktemp("ranks"))
    yield process
    process.end()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs that tests share and do not change."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scanned digits as PNGs, wider than high: ``<split>/<class>/<number>.png``."""
    scans = load_digits()
    folder = tmp_path_factory.mktemp("pictures")
    for name in tiny.CLASSES:
        mine = scans.images[scans.target == int(name)]
        for number, scan in enumerate(mine[: tiny.TRAIN + tiny.HELD_OUT]):
            path = folder / ("train" if number < tiny.TRAIN else "held_out") / name / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((scan * 15.9).astype(np.uint8)).resize((tiny.WIDTH, tiny.SIDE))
            grey.convert("RGB").save(path)
    return folder


@pytest.fixture(scope="session")
def shards(pictures: Path, root: Path) -> ShardManifest:
    config = ShardConfig(images_per_shard=10, runner=Local(count=2))
    archive = ArchiveRef(train=str(pictures / "train"), held_out=str(pictures / "held_out"))
    inputs = input_digests(archive)
    out = stage_output(str(root), shard.STAGE, shard.VERSION, config, parents={}, inputs=inputs)
    return shard.run(config, archive, out=out, tracker=NullTracker())


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VaeRef:
    """An autoencoder with random weights: 4 channels, 4 pixels to a latent pixel."""
    return tiny.save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def latents(root: Path, shards: ShardManifest, vae: VaeRef) -> LatentManifest:
    return tiny.run_encode(root, tiny.encode_config(vae), shards)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentManifest:
    """Latents of no pictures."""
    return synthetic.latents(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def checkpoint(root: Path, latents: LatentManifest) -> CheckpointManifest:
    return tiny.run_train(root, tiny.TRAINING, latents)


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory, latents: LatentManifest
) -> tuple[tiny.Recorder, CheckpointManifest]:
    """A training that nothing interrupts, and what it told."""
    return tiny.through(tmp_path_factory.mktemp("whole"), tiny.TRAINING, latents)


@pytest.fixture(scope="session")
def samples(root: Path, checkpoint: CheckpointManifest) -> SampleManifest:
    return tiny.run_sample(root, tiny.SAMPLING, checkpoint)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """An extractor with random weights, which takes every image for a 5."""
    folder = tmp_path_factory.mktemp("classifier")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DigitsClassifier()
    state = network.state_dict()
    state["head.weight"].zero_()
    state["head.bias"].copy_(torch.arange(10) == 5)
    (folder / "model.safetensors").write_bytes(save(state))
    return EvaluateConfig(extractor=ExtractorRef(weights=str(folder)), batch_size=16)
