from pathlib import Path
from typing import Any

import numpy as np
import plain_dit
import pytest
import tiny
import torch
from PIL import Image
from random_dit import pretrained, random_dit
from safetensors.torch import save_file

from dit.convert import read, write
from dit.diffusion.config import FlowConfig
from dit.draw import open_checkpoint, preview
from dit.export import CheckpointManifest
from dit.sample import SampleManifest
from dit.samplers.config import SampleConfig
from dit.vae import VaeRef
from storage.errors import InputError
from storage.rows.store import RowReader
from storage.tracker import NullTracker

SAMPLING = SampleConfig(count=5, labels="balanced", steps=3, guidance_scale=2, batch_size=4)


def drawn(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "samples.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of the published checkpoints."""
    path = tmp_path_factory.mktemp("published") / "dit.safetensors"
    save_file(random_dit().state_dict(), path)
    return path


def test_samples_of_a_stage_and_of_its_folder_are_the_same(
    tmp_path: Path, checkpoint: CheckpointManifest, samples: SampleManifest
) -> None:
    urls = preview(open_checkpoint(checkpoint.uri), tiny.SAMPLING, str(tmp_path / "out"), NullTracker())
    assert urls == [str(tmp_path / "out" / name) for name in ("samples.png", "samples.npz")]
    found = drawn(tmp_path / "out")
    gap = np.abs(found["arr_0"].astype(int) - RowReader(samples).array("image"))
    assert gap.max() <= 1 and gap.mean() < 1e-3  # batches of other sizes may move a number over the border of two bytes
    assert np.array_equal(found["arr_1"], RowReader(samples).array("label"))
    assert found["arr_1"].dtype == np.int64


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"vae": "other"}, "remove --vae; sample.vae.source names another decoder"),
        ({"class_names": "names.txt", "heads": None}, "remove --class-names$"),
        ({"process": "flow"}, "remove --process$"),
    ],
)
def test_nothing_is_told_of_a_model_that_was_trained_here(
    checkpoint: CheckpointManifest, told: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=f"^{checkpoint.uri}: was trained here and records this; {reason}"):
        open_checkpoint(checkpoint.uri, **told)


def test_a_published_file_needs_its_autoencoder_named(tmp_path: Path, published: Path, vae: VaeRef) -> None:
    with pytest.raises(InputError, match=r"does not name its autoencoder; pass --vae, .* stabilityai/sd-vae-ft-ema"):
        open_checkpoint(str(published), heads=4)
    trained = open_checkpoint(str(published), heads=4, vae=vae.source)
    assert (trained.card.resolution, len(trained.card.class_names)) == (64, 10)
    preview(trained, SAMPLING, str(tmp_path), NullTracker())
    found = drawn(tmp_path)
    assert found["arr_0"].shape == (5, 64, 64, 3)
    assert found["arr_1"].tolist() == [0, 1, 2, 3, 4]
    with Image.open(tmp_path / "samples.png") as grid:
        first = np.asarray(grid.convert("RGB"))[:64, :64]
    assert np.array_equal(first, found["arr_0"][0])


def test_a_flow_is_sampled_as_one(tmp_path: Path, vae: VaeRef) -> None:
    """Of a SiT's file, which has twice the outputs of a flow, and of the one that we write."""
    torch.save(plain_dit.random_file(16, width=64, depth=1, channels=4, outputs=8, patch=2), tmp_path / "SiT.pt")
    told: Any = {"heads": 4, "process": "flow"}
    write(read(str(tmp_path / "SiT.pt"), **told), str(tmp_path / "ours.safetensors"), "reference")
    sampling = SAMPLING.model_copy(update={"sampler": "euler"})
    for name, hints in (("SiT.pt", told), ("ours.safetensors", {"heads": 4})):
        trained = open_checkpoint(str(tmp_path / name), vae=vae.source, **hints)
        assert trained.card.diffusion == FlowConfig()
        preview(trained, sampling, str(tmp_path / f"of-{name}"), NullTracker())
    of_sit, of_ours = (drawn(tmp_path / f"of-{name}")["arr_0"] for name in ("SiT.pt", "ours.safetensors"))
    assert np.array_equal(of_sit, of_ours)
    assert of_sit.std() > 1


def test_a_pipelines_folder_brings_its_autoencoder(tmp_path: Path, published: Path, vae: VaeRef) -> None:
    write(pretrained(random_dit()), str(tmp_path / "pipeline"), "pipeline", vae=vae.source)
    for name, source in (
        ("folder", open_checkpoint(str(tmp_path / "pipeline"))),
        ("file", open_checkpoint(str(published), heads=4, vae=vae.source)),
    ):
        preview(source, SAMPLING, str(tmp_path / name), NullTracker())
    assert np.array_equal(drawn(tmp_path / "folder")["arr_0"], drawn(tmp_path / "file")["arr_0"])


def test_nothing_is_overwritten(tmp_path: Path, checkpoint: CheckpointManifest) -> None:
    (tmp_path / "samples.npz").write_bytes(b"mine")
    with pytest.raises(InputError, match="has samples already; name another folder"):
        preview(open_checkpoint(checkpoint.uri), SAMPLING, str(tmp_path), NullTracker())
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_a_pipeline_of_a_pipeline_keeps_its_autoencoder(tmp_path: Path, vae: VaeRef) -> None:
    write(pretrained(random_dit()), str(tmp_path / "first"), "pipeline", vae=vae.source)
    write(read(str(tmp_path / "first")), str(tmp_path / "second"), "pipeline")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        first, second = (tmp_path / folder / "vae" / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
