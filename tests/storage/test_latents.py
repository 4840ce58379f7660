from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.latents import LatentManifest, VaeInfo, latent_layout
from storage.manifest import StageOutput
from storage.rows.store import RowReader, RowWriter

SHAPE = (4, 2, 2)
ROWS = 10


@pytest.fixture(params=[1, 2])
def flips(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def arrays(flips: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(flips)
    moments = generator.standard_normal((2, ROWS, flips, *SHAPE)).astype(np.float16)
    return {
        "mean": moments[0],
        "std": moments[1],
        "label": np.arange(ROWS, dtype=np.int32) % 3,
        "source_index": np.arange(ROWS, dtype=np.int64)[::-1].copy(),
    }


@pytest.fixture
def manifest(tmp_path: Path, new_output: Callable[..., StageOutput], flips: int) -> LatentManifest:
    out = new_output(tmp_path, "encode")
    writer = RowWriter(out, latent_layout(ROWS, flips, SHAPE, block_rows=4, chunk_rows=2), {})
    for block in writer.missing():
        start, stop = writer.bounds(block)
        writer.write(block, {name: values[start:stop] for name, values in arrays(flips).items()})
    vae = VaeInfo(source="x", sha256="0" * 64, downsample=8, channels=4, scaling_factor=0.18215)
    return out.commit(
        LatentManifest,
        writer.finish(),
        counts={"images": ROWS},
        resolution=16,
        split="train",
        flips=flips,
        latent_shape=SHAPE,
        class_names=("a", "b", "c"),
        vae=vae,
    )


def test_moments_of_images_and_mirrors(manifest: LatentManifest, flips: int) -> None:
    reader, stored = RowReader(manifest), arrays(flips)
    labels = reader.array("label")
    assert len(labels) == manifest.count == ROWS
    assert labels.dtype == np.int32
    assert np.array_equal(labels, stored["label"])
    indices, sides = np.array([9, 0, 4, 4]), np.array([0, 1, 1, 0]) % flips
    for name in ("mean", "std"):
        moments = reader.take(name, indices, sides)
        assert moments.dtype == np.float16
        assert np.array_equal(moments, stored[name][indices, sides])


def test_a_mirror_that_was_not_stored_is_refused(manifest: LatentManifest, flips: int) -> None:
    with pytest.raises(IndexError, match=f"data/mean: first-axis index {flips} is outside 0 to {flips - 1}"):
        RowReader(manifest).take("mean", np.array([0]), np.array([flips]))


def test_the_manifest_comes_back_from_disk(manifest: LatentManifest) -> None:
    again = LatentManifest.read(manifest.uri)
    assert again == manifest
    assert again.latent_shape == SHAPE


def test_the_location_of_the_vae_is_redacted_and_not_in_the_identity() -> None:
    def info(source: str) -> VaeInfo:
        return VaeInfo(source=source, sha256="0" * 64, downsample=8, channels=4, scaling_factor=1)

    assert info("here").identity() == info("there").identity()
    assert info("s3://key:secret@bucket/vae").source == "s3://bucket/vae"


def test_default_layout_is_the_published_one() -> None:
    layout = latent_layout(1_281_167, 2, (4, 32, 32))
    mean = layout.arrays[0]
    assert (mean.chunk(layout.block_rows), mean.chunk(mean.chunk_rows)) == ((4096, 1, 4, 32, 32), (256, 1, 4, 32, 32))
    assert layout.blocks == 313
