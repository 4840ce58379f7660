import io
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from forked import Job, Template
from PIL import Image

from dit import encode
from dit.encode import fitting_batch
from dit.vae import Vae, VaeRef
from storage.errors import DitflowError, InputError, StorageError
from storage.latents import LatentManifest
from storage.rows.store import RowReader, RowWriter
from storage.shards.shard import ShardManifest, read_images

LEFT = (tiny.WIDTH - tiny.SIDE) // 2


def posterior(vae: VaeRef, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By diffusers alone."""
    model = AutoencoderKL.from_pretrained(vae.source, low_cpu_mem_usage=False).eval()
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        found = model.encode(pixels).latent_dist
    return found.mean.numpy(), found.std.numpy()


def test_both_flips_are_what_diffusers_gives(latents: LatentManifest, pictures: Path, vae: VaeRef) -> None:
    files = sorted((pictures / "train").rglob("*.png"), key=lambda path: path.as_posix())
    rows = RowReader(latents)
    order = rows.array("source_index")
    assert sorted(order) == list(range(tiny.COUNT))
    plain = np.stack([np.asarray(Image.open(files[index])) for index in order])[:, :, LEFT : LEFT + tiny.SIDE]
    for flip, images in enumerate((plain, plain[:, :, ::-1])):
        which = np.full(len(order), flip)
        for name, expected in zip(("mean", "std"), posterior(vae, images), strict=True):
            found = rows.take(name, np.arange(len(order)), which)
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)


def test_labels_are_those_of_the_folders(latents: LatentManifest, pictures: Path) -> None:
    files = sorted((pictures / "train").rglob("*.png"), key=lambda path: path.as_posix())
    rows = RowReader(latents)
    names = [latents.class_names[label] for label in rows.array("label")]
    assert names == [files[index].parent.name for index in rows.array("source_index")]


def test_manifest_says_what_the_latents_are(latents: LatentManifest, vae: VaeRef, shards: ShardManifest) -> None:
    assert (latents.count, latents.flips, latents.latent_shape) == (tiny.COUNT, 2, (4, 8, 8))
    assert (latents.resolution, latents.split, latents.class_names) == (tiny.SIDE, "train", tiny.CLASSES)
    assert (latents.vae.scaling_factor, latents.vae.shift_factor) == (tiny.SCALE, tiny.SHIFT)
    assert latents.vae.source == vae.source
    assert latents.parent("shards", ShardManifest).digest == shards.digest
    attributes = RowReader(latents).attributes
    assert attributes["vae_sha256"] == latents.vae.sha256
    assert attributes["scaled"] is False


def test_without_flips_and_of_the_other_split(
    tmp_path: Path, latents: LatentManifest, shards: ShardManifest, vae: VaeRef
) -> None:
    plain = tiny.run_encode(tmp_path, tiny.encode_config(vae, flips=False), shards)
    flipped, unflipped = RowReader(latents), RowReader(plain)
    for name in ("mean", "std"):
        assert unflipped.array(name).shape[1] == 1
        np.testing.assert_allclose(unflipped.array(name)[:, 0], flipped.array(name)[:, 0], rtol=2e-3, atol=1e-3)
    held_out = tiny.run_encode(tmp_path, tiny.encode_config(vae, split="held_out"), shards)
    assert held_out.count == tiny.HELD_OUT * len(tiny.CLASSES)


def spoil_nothing(folder: Path) -> None:
    pass


def lose_an_object(folder: Path) -> None:
    (folder / "data/mean/c/0/1/0/0/0").unlink()


def halve_an_object(folder: Path) -> None:
    path = folder / "data/std/c/1/0/0/0/0"
    path.write_bytes(path.read_bytes()[:-7])


def lose_a_record(folder: Path) -> None:
    (folder / "records/rows-00001.json").unlink()


@pytest.mark.parametrize("fault", [spoil_nothing, lose_an_object, halve_an_object, lose_a_record])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, latents: LatentManifest, shards: ShardManifest, vae: VaeRef, fault: Callable[[Path], None]
) -> None:
    config, killer = tiny.encode_config(vae), tiny.Killer(when=35)
    with pytest.raises(tiny.Killed):
        tiny.run_encode(tmp_path, config, shards, killer)
    folder = Path(tiny.output(tmp_path, LatentManifest, config, shards=shards).uri)
    assert sorted(path.name for path in (folder / "records").iterdir()) == ["rows-00000.json", "rows-00001.json"]
    fault(folder)
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))  # tells what is written again; an inode may be used again, a time is not
    recorder = tiny.Recorder()
    resumed = tiny.run_encode(tmp_path, config, shards, recorder)
    assert tiny.objects(resumed) == tiny.objects(latents)
    assert "reconstructions.png" in recorder.artifacts
    redone = {path.name for path in (folder / "records").iterdir() if path.stat().st_mtime_ns}
    spoiled = {lose_an_object: 0, halve_an_object: 1, lose_a_record: 1}
    assert redone == {f"rows-{block:05d}.json" for block in (2, spoiled.get(fault, 2))}
    done = [done for done, _, _ in recorder.steps]
    assert done[0] == (37 if fault is spoil_nothing else 21)
    assert done == sorted(done)
    assert recorder.steps[-1] == (tiny.COUNT, tiny.COUNT, "images")


def test_a_fault_within_a_block_leaves_nothing_of_it(
    tmp_path: Path, latents: LatentManifest, shards: ShardManifest, vae: VaeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], Vae.encode

    def failing(self: Vae, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(images))
        if len(calls) == 11:  # of two for each batch, four batches to a block
            raise RuntimeError("out of memory")
        return real(self, images)

    monkeypatch.setattr(Vae, "encode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny.run_encode(tmp_path, tiny.encode_config(vae), shards)
    folder = Path(tiny.output(tmp_path, LatentManifest, tiny.encode_config(vae), shards=shards).uri)
    assert [path.name for path in (folder / "records").iterdir()] == ["rows-00000.json"]
    assert not (folder / "data/mean/c/1").exists()
    assert tiny.objects(tiny.run_encode(tmp_path, tiny.encode_config(vae), shards)) == tiny.objects(latents)


def test_reconstructions_show_the_images_and_their_quality(latents: LatentManifest, vae: VaeRef) -> None:
    picture = np.asarray(Image.open(io.BytesIO(latents.read_object("artifacts/reconstructions.png"))))
    pitch = tiny.SIDE + 2  # a gap of two pixels
    padded = np.pad(picture, ((0, 2), (0, 2), (0, 0)))
    cells = padded.reshape(-1, pitch, 8, pitch, 3).swapaxes(1, 2)[:, :, : tiny.SIDE, : tiny.SIDE]
    cells = cells.reshape(-1, 2, tiny.SIDE, tiny.SIDE, 3)
    assert len(cells) == 32
    images, decoded = cells[:, 0], cells[:, 1].astype(np.float64)
    model = AutoencoderKL.from_pretrained(vae.source, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        raw = model.decode(torch.from_numpy(posterior(vae, images)[0])).sample.permute(0, 2, 3, 1).numpy()
    expected = np.trunc(np.clip(127.5 * raw.astype(np.float64) + 128, 0, 255))
    assert np.abs(decoded - expected).max() <= 1
    psnr = 10 * np.log10(255**2 / np.square(images - decoded).mean())
    assert latents.metrics["reconstruction_psnr_db"] == pytest.approx(psnr)


def test_half_precision_is_near_and_says_so(
    tmp_path: Path, latents: LatentManifest, shards: ShardManifest, vae: VaeRef
) -> None:
    half = tiny.run_encode(tmp_path, tiny.encode_config(vae, precision="bfloat16"), shards)
    found, expected = RowReader(half).array("mean"), RowReader(latents).array("mean")
    np.testing.assert_allclose(found, expected, atol=0.05, rtol=0.1)
    assert not np.array_equal(found, expected)
    assert RowReader(half).attributes["precision"] == "bfloat16"


def test_a_compiled_encoder_is_another_work_and_says_so(
    tmp_path: Path, latents: LatentManifest, shards: ShardManifest, vae: VaeRef
) -> None:
    with torch.compiler.set_stance("force_eager"):
        compiled = tiny.run_encode(tmp_path, tiny.encode_config(vae, compile=True), shards)
    assert RowReader(compiled).attributes["compiled"] is True
    assert RowReader(latents).attributes["compiled"] is False
    assert compiled.digest != latents.digest
    np.testing.assert_array_equal(RowReader(compiled).array("mean"), RowReader(latents).array("mean"))


def test_a_batch_that_memory_chose_is_kept_for_who_goes_on(
    tmp_path: Path, shards: ShardManifest, vae: VaeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sizes, real = tiny.encode_config(vae, batch_size=None), set[int](), Vae.encode

    def noting(self: Vae, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.add(len(images))
        return real(self, images)

    monkeypatch.setattr(Vae, "encode", noting)
    monkeypatch.setattr(encode, "_chosen_batch", lambda *_: 7)
    with pytest.raises(tiny.Killed):
        tiny.run_encode(tmp_path, config, shards, tiny.Killer(when=20))
    assert sizes == {7, 2}  # a block of 16
    (record,) = tmp_path.glob("encode/*/records/batch_size")
    whole = record.read_bytes()
    record.write_bytes(whole.replace(b"7", b"5", 1))
    with pytest.raises(StorageError, match="batch_size: damaged; delete .* and run encode again"):
        tiny.run_encode(tmp_path, config, shards)
    record.write_bytes(whole)
    monkeypatch.setattr(encode, "_chosen_batch", lambda *_: 3)
    manifest = tiny.run_encode(tmp_path, config, shards)
    assert sizes == {7, 2, 3, 4}  # the last block's, and the picture's
    assert RowReader(manifest).attributes["batch_size"] == 7


def test_the_batch_that_fits() -> None:
    gib = 2**30
    assert fitting_batch(80 * gib, gib // 4, 256) == 128  # by the indices
    assert fitting_batch(80 * gib, gib, 512) == 32
    assert fitting_batch(20 * gib, gib // 4, 256) == 32
    assert fitting_batch(20 * gib, gib // 3, 256) == 16
    assert fitting_batch(gib, gib, 4096) == 1


@pytest.mark.parametrize("part", ["tars", "images", "store"])
def test_an_error_of_any_thread_ends_the_stage(
    tmp_path: Path, shards: ShardManifest, vae: VaeRef, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise StorageError(f"the {part}")

    def some(*arguments: Any) -> Any:
        yield from list(read_images(*arguments))[:2]
        fail()

    if part == "tars":
        monkeypatch.setattr(encode, "read_images", some)
    elif part == "images":
        monkeypatch.setattr("storage.images.transforms.load_fast", fail)
    else:
        monkeypatch.setattr(RowWriter, "write", fail)
    with pytest.raises(StorageError, match=f"^the {part}$"):
        tiny.run_encode(tmp_path, tiny.encode_config(vae), shards)
    assert not list(tmp_path.rglob("manifest.json"))


class Direct(Executor):
    """Does what is submitted before it returns."""

    def submit(self, work: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(work(*given, **named))
        except StorageError as error:
            future.set_exception(error)
        return future


def test_a_block_that_cannot_be_written_stops_the_next_within_a_batch(
    tmp_path: Path, shards: ShardManifest, vae: VaeRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is done at once here, where it is submitted."""

    def fail(*_: Any) -> Any:
        raise StorageError("the disk is full")

    recorder = tiny.Recorder()
    monkeypatch.setattr(RowWriter, "write", fail)
    monkeypatch.setattr(encode, "threads", lambda _: nullcontext(Direct()))
    with pytest.raises(StorageError, match="the disk is full"):
        tiny.run_encode(tmp_path, tiny.encode_config(vae), shards, recorder)
    assert [done for done, *_ in recorder.steps] == [5, 10, 15, 16]


def test_two_ranks_share_the_blocks_and_make_the_same_bytes(
    tmp_path: Path, latents: LatentManifest, shards: ShardManifest, vae: VaeRef, template: Template
) -> None:
    config = tiny.encode_config(vae)
    out = tiny.output(tmp_path, LatentManifest, config, shards=shards)
    told = template.finish(Job(out, config, shards)).progress
    assert tiny.objects(LatentManifest.read(out.uri)) == tiny.objects(latents)
    assert {rank: sum(r == rank for r, *_ in told) for rank in (0, 1)} == {0: 6, 1: 4}  # batches: 4 and 2; 4
    assert [done for rank, done, _ in told if rank == 0] == [8, 16, 24, 26, 34, 42]
    assert {total for _, _, total in told} == {tiny.COUNT}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resolution": 30}, "encode.resolution: 30 px is not a multiple of the VAE's 4"),
        ({"split": "test"}, "encode.split: the data has no split 'test', only train, held_out"),
        ({"block_rows": 12}, "block_rows = 12 is not a multiple of chunk_rows = 8"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, shards: ShardManifest, vae: VaeRef, changes: dict[str, object], reason: str
) -> None:
    config = tiny.encode_config(vae).model_copy(update=changes)
    with pytest.raises(InputError, match=reason):
        tiny.run_encode(tmp_path, config, shards)
    assert not list(tmp_path.rglob("*.json"))


def test_latents_that_are_no_numbers_are_refused(tmp_path: Path, shards: ShardManifest) -> None:
    vae = tiny.save_vae(tmp_path / "vae")
    model = AutoencoderKL.from_pretrained(vae.source, low_cpu_mem_usage=False)
    with torch.no_grad():
        model.quant_conv.weight.mul_(1e7)
    model.save_pretrained(vae.source)
    with pytest.raises(DitflowError, match="not finite in float16"):
        tiny.run_encode(tmp_path, tiny.encode_config(vae), shards)
    assert not list(tmp_path.rglob("rows-*.json"))
